"""What will happen, before anything starts: all of it as one value. Pure but for the look-up of tuned files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ep.errors import OptionError
from ep.explain.context import ContextLength, context_length
from ep.explain.current_rule import batch_defaults, current_rule
from ep.explain.hardware import Hardware
from ep.explain.layout import Layout, plan_layout
from ep.explain.memory import KvCache, RouterMemory, ShardMemory, kv_cache, router_memory, shard_memory
from ep.explain.older_rule import older_rule
from ep.explain.parameters import Part, model_parts
from ep.explain.published import PUBLISHED, PublishedSize
from ep.explain.round_trip import RoundTrip, round_trip
from ep.explain.step_time import StepTime, decode_tokens, prefill_tokens, step_time
from ep.explain.steps import Batch, Rule
from ep.explain.tuned import TunedFile, device_of, tuned_files
from ep.model import ModelSpec
from ep.serve_options import default_shards


@dataclass(frozen=True)
class Question:
    """What is asked. shards: None for the largest power of two that leaves the router a GPU. captured_len:
    --max-seq-len-to-capture of the older engine, None for the sequences' own length."""

    model: str
    batch: Batch
    shards: int | None = None
    nodes: int = 1
    redundant: int = 0
    spare_slots: int | None = None
    max_model_len: int | None = None
    captured_len: int | None = None
    kv_cache_dtype: str = "auto"
    dispatch_dtype: str = "bf16"


@dataclass(frozen=True)
class ExpertMatrix:
    """Of every routed expert. scale_shape: None where weights have no scales."""

    name: str
    shape: tuple[int, ...]
    scale_shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Sizes:
    """Parameters and bytes of the checkpoint. active: parameters that one token is multiplied with, the embedding's
    table included; active_without_embedding: as a token reads one row of it. expert, expert_layer: of one routed
    expert, of all of a layer."""

    params: int
    active: int
    active_without_embedding: int
    params_with_next_token: int
    bytes: int
    bytes_with_next_token: int
    expert_bytes: int
    expert_layer_bytes: int
    published: PublishedSize | None
    off_published: float | None


@dataclass(frozen=True)
class Explanation:
    """The answer. fewest_shards: that fit their GPUs, from the asked number upwards; None where no number does. tuned:
    the device's own rows first."""

    model: str
    question: Question
    spec: ModelSpec
    hardware: Hardware
    expert_matrices: tuple[ExpertMatrix, ...]
    parts: tuple[Part, ...]
    sizes: Sizes
    layout: Layout
    context: ContextLength
    kv: KvCache
    shard: ShardMemory
    fewest_shards: int | None
    router: RouterMemory
    older: Rule
    current: Rule
    tuned: tuple[tuple[str, tuple[TunedFile, ...]], ...]
    round_trip: RoundTrip
    decode: StepTime
    prefill: StepTime


def explain(
    question: Question,
    spec: ModelSpec,
    config: Mapping[str, Any],
    hardware: Hardware,
    relatives: tuple[Hardware, ...] = (),
    folders: tuple[Path, ...] | None = None,
) -> Explanation:
    """config: the model's config.json. relatives: devices that go by the same names. folders: of tuned files.

    Raises OptionError, PlacementError.
    """
    batch = question.batch
    context = context_length(config, question.max_model_len)
    if batch.total_len > context.tokens:
        raise OptionError(
            f"--input-len {batch.input_len} --output-len {batch.output_len}: {batch.total_len} tokens, "
            f"expected at most {context.tokens}, max_model_len ({context.why})"
        )
    shards = question.shards or default_shards(spec.num_experts, question.nodes * hardware.gpus_per_node)
    layout = plan_layout(
        spec, question.nodes, hardware.gpus_per_node, shards, question.redundant, question.spare_slots
    )
    device = device_of(hardware)
    device_bytes = int(hardware.memory_bytes.value)
    parts = model_parts(spec)
    kv = kv_cache(spec, question.kv_cache_dtype)
    fp8 = device.fp8_dtype or torch.float8_e4m3fn
    shard = shard_memory(spec, layout.slots_per_shard, fp8, device_bytes)
    defaults = batch_defaults(device_bytes, context.tokens)
    router = router_memory(
        spec,
        parts,
        kv,
        device_bytes=device_bytes,
        shard_bytes=layout.beside_router * shard.total,
        budget=defaults.max_num_batched_tokens,
        max_num_seqs=defaults.max_num_seqs,
        request_tokens=batch.total_len,
        max_model_len=context.tokens,
    )
    current = current_rule(batch, context.tokens, device_bytes, router.requests)
    decoded = decode_tokens(current.running, batch.input_len + max(1, batch.output_len // 2))
    prefilled = prefill_tokens(
        min(defaults.max_num_batched_tokens, current.running * batch.input_len), batch.input_len
    )
    trip, prefill_trip = (
        round_trip(spec, hardware, layout, tokens.count, question.dispatch_dtype) for tokens in (decoded, prefilled)
    )
    quantized = spec.quant_block is not None
    return Explanation(
        model=question.model,
        question=question,
        spec=spec,
        hardware=hardware,
        expert_matrices=_expert_matrices(spec),
        parts=parts,
        sizes=_sizes(question.model, spec, parts),
        layout=layout,
        context=context,
        kv=kv,
        shard=shard,
        fewest_shards=shards if shard.fits else _fewest_shards(question, spec, layout, fp8, device_bytes),
        router=router,
        older=older_rule(
            batch, context.tokens, spec.mla is not None, hardware.is_amd, router.requests, question.captured_len
        ),
        current=current,
        tuned=tuple(
            (one.key, tuned_files(one, layout.slots_per_shard, spec.moe_intermediate_size, quantized, folders))
            for one in (hardware, *relatives)
        ),
        round_trip=trip,
        decode=step_time("decode", spec, parts, hardware, kv, decoded, trip),
        prefill=step_time("prefill", spec, parts, hardware, kv, prefilled, prefill_trip),
    )


def _fewest_shards(
    question: Question, spec: ModelSpec, layout: Layout, fp8_dtype: torch.dtype, device_bytes: int
) -> int | None:
    for shards in range(layout.shards + 1, spec.num_experts + 1):
        more = plan_layout(
            spec, layout.nodes, layout.gpus_per_node, shards, question.redundant, question.spare_slots
        )
        if shard_memory(spec, more.slots_per_shard, fp8_dtype, device_bytes).fits:
            return shards
    return None


def _expert_matrices(spec: ModelSpec) -> tuple[ExpertMatrix, ...]:
    tensors = spec.expert_tensors(spec.moe_layers[0], 0)
    return tuple(
        ExpertMatrix(name, tensor.shape, tensor.scale_shape)
        for name, tensor in zip(("gate", "up", "down"), tensors, strict=True)
    )


def _sizes(model: str, spec: ModelSpec, parts: tuple[Part, ...]) -> Sizes:
    proper = [part for part in parts if part.holder != "nobody"]
    params = sum(part.params for part in proper)
    active = sum(part.active_params for part in proper)
    embedding = sum(part.params for part in proper if part.name == "embedding")
    published = PUBLISHED.get(model)
    return Sizes(
        params=params,
        active=active,
        active_without_embedding=active - embedding,
        params_with_next_token=sum(part.params for part in parts),
        bytes=sum(part.bytes for part in proper),
        bytes_with_next_token=sum(part.bytes for part in parts),
        expert_bytes=spec.expert_bytes,
        expert_layer_bytes=spec.num_experts * spec.expert_bytes,
        published=published,
        off_published=None if published is None else params / published.params - 1,
    )

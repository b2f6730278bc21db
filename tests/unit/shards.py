"""Small shards for the data plane's tests: a spec, random experts, shards in this process or in their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ep.checkpoint import SlotWeights
from ep.kernels.reference import Experts, experts_forward
from ep.model import ModelSpec
from ep.placement import EMPTY, Placement, even_split
from ep.shard import Shard
from ep.transport.base import Endpoint

KEY = b"k" * 32
NODE = "node-a"
NUM_EXPERTS, TOP_K, NUM_LAYERS = 8, 4, 2


def make_spec(
    hidden_size: int = 64, moe_intermediate_size: int = 32, top_k: int = TOP_K, num_layers: int = NUM_LAYERS
) -> ModelSpec:
    config = {
        "architectures": ["MixtralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": moe_intermediate_size,
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": top_k,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "vocab_size": 128,
        "rms_norm_eps": 1e-5,
    }
    return ModelSpec.from_config(config, "test")


def make_experts(spec: ModelSpec, dtype: torch.dtype, seed: int = 0) -> list[Experts]:
    """One per MoE layer."""
    generator = torch.Generator().manual_seed(seed)
    num, hidden, inter = spec.num_experts, spec.hidden_size, spec.moe_intermediate_size
    return [
        Experts(
            (torch.randn(num, 2 * inter, hidden, generator=generator) / hidden**0.5).to(dtype),
            (torch.randn(num, hidden, inter, generator=generator) / inter**0.5).to(dtype),
        )
        for _ in range(spec.num_moe_layers)
    ]


def make_shard(
    spec: ModelSpec, placement: Placement, shard_idx: int, experts: list[Experts], shard_class: type[Shard] = Shard
) -> Shard:
    layers = []
    for layer, slots in zip(experts, placement.slots[:, shard_idx], strict=True):
        held = torch.tensor([0 if slot == EMPTY else int(slot) for slot in slots])
        layers.append(SlotWeights(layer.w13[held].clone(), layer.w2[held].clone()))
    return shard_class(spec, placement, shard_idx, layers, device="cpu")


def random_routing(spec: ModelSpec, num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden float32 [T, H], topk_ids int32 [T, K], topk_weights float32 [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, spec.hidden_size, generator=generator)
    scores = torch.rand(num_tokens, spec.num_experts, generator=generator)
    weights, ids = scores.topk(spec.top_k, dim=-1)
    return hidden, ids.int(), weights


def expected(
    experts: Experts, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> torch.Tensor:
    """The reference on float64."""
    wide = Experts(experts.w13.double(), experts.w2.double())
    return experts_forward(hidden.double(), topk_ids, topk_weights, wide)


BF16_BOUND = 1.5e-2
"""Of experts in bf16 on any CPU: where vLLM's op is missing, plain torch rounds between its products as well."""


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    if not wanted.numel():
        return 0.0
    return ((actual.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


@dataclass
class ShardProcess:
    """A shard in a process of its own, as a node would run it."""

    process: Any
    endpoint: Endpoint
    pipe: Connection

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def stop(self) -> None:
        if self.process.is_alive():
            self.pipe.send("stop")
            self.process.join(10)

    @classmethod
    def start(
        cls, folder: Path, make: Callable[..., Shard], *arguments: Any, host: str | None = "127.0.0.1"
    ) -> ShardProcess:
        """make(*arguments) -> Shard runs in the process; everything must pickle."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ep.shard"])  # torch is imported once, not by every shard
        ours, theirs = context.Pipe()
        process = context.Process(target=_run, args=(theirs, str(folder), host, make, arguments), daemon=True)
        process.start()
        return cls(process, ours.recv(), ours)


def _run(
    pipe: Connection, folder: str, host: str | None, make: Callable[..., Shard], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    shard = make(*arguments)
    pipe.send(shard.listen(KEY, NODE, host=host, unix_dir=folder))
    pipe.recv()
    shard.close()


def even_shard(shard_idx: int, num_shards: int, dtype: torch.dtype, shard_class: type[Shard] = Shard) -> Shard:
    """One shard of an even split of `make_experts`."""
    spec = make_spec()
    placement = even_split(spec.num_moe_layers, spec.num_experts, num_shards)
    return make_shard(spec, placement, shard_idx, make_experts(spec, dtype), shard_class)


class SlowShard(Shard):
    """Takes its time over each computation."""

    seconds = 0.3

    def _answer(self, *arguments: Any) -> int:
        time.sleep(self.seconds)
        return super()._answer(*arguments)


class HungShard(SlowShard):
    seconds = 60.0

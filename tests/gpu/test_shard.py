"""A shard on a real GPU, asked as a router asks it, against the reference in float64."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from ep.assign import split
from ep.bench.moe_case import random_weights
from ep.checkpoint import Checkpoint, SlotWeights
from ep.errors import ModelError
from ep.kernels import reference
from ep.kernels.devices import current_device
from ep.kernels.fused_moe import ExpertShape
from ep.model import ModelSpec
from ep.placement import even_split
from ep.shard import Shard
from ep.transport.base import Transport
from ep.transport.buffer import to_raw
from ep.transport.handshake import Greeting
from ep.transport.local import LocalTransport
from ep.transport.sockets import SocketTransport
from ep.wire import Dispatch
from tests.cases import small_checkpoint, small_config
from tests.unit.shards import KEY, NODE, SlowShard

SLOTS, TOP_K, LAYERS = 4, 2, 2
PASS_TOKENS = 256
SIZES = {"deepseek_v3": (1024, 512), "mixtral": (1024, 1792)}
EXACT = {"deepseek_v3": 7e-2, "mixtral": 5e-3}
"""Against unquantised activations: FP8's own error on rows as short as these."""


@dataclass(frozen=True)
class Held:
    """A shard with all experts of its model, and the same weights as float64 per layer."""

    shard: Shard
    dense: list[reference.Experts]


def make_spec(family: str) -> ModelSpec:
    hidden, inter = SIZES[family]
    changes = {"hidden_size": hidden, "num_experts_per_tok": TOP_K, "num_hidden_layers": LAYERS}
    if family == "deepseek_v3":
        changes |= {"moe_intermediate_size": inter, "first_k_dense_replace": 0, "n_routed_experts": SLOTS}
        changes |= {"n_group": 1, "topk_group": 1}
    else:
        changes |= {"intermediate_size": inter, "num_local_experts": SLOTS}
    return ModelSpec.from_config(small_config(family, **changes), "a/config.json")


def make_layers(family: str) -> list[SlotWeights]:
    """As a checkpoint's: e4m3fn with scales, or bf16, on the host."""
    if family == "deepseek_v3" and current_device().fp8_dtype is None:
        pytest.skip("no FP8 matrix units")
    dtype = torch.float8_e4m3fn if family == "deepseek_v3" else torch.bfloat16
    made = random_weights(ExpertShape(LAYERS, SLOTS, *SIZES[family], dtype))
    stacks = (made.gate_up, made.down, made.gate_up_scale_inv, made.down_scale_inv)
    return [SlotWeights(*(None if s is None else s[layer].cpu() for s in stacks)) for layer in range(LAYERS)]  # type: ignore[arg-type]


def dense(weights: SlotWeights) -> reference.Experts:
    if weights.w13_scale is None or weights.w2_scale is None:
        return reference.Experts(weights.w13.double(), weights.w2.double())
    w13 = [reference.dequantize_blocks(q, scale) for q, scale in zip(weights.w13, weights.w13_scale)]
    w2 = [reference.dequantize_blocks(q, scale) for q, scale in zip(weights.w2, weights.w2_scale)]
    return reference.Experts(torch.stack(w13).double(), torch.stack(w2).double())


@cache
def held(family: str, shard_class: type[Shard] = Shard) -> Held:
    layers = make_layers(family)
    placement = even_split(LAYERS, SLOTS, 1)
    shard = shard_class(make_spec(family), placement, 0, layers, max_pass_tokens=PASS_TOKENS)
    return Held(shard, [dense(layer) for layer in layers])


def ask(
    transport: Transport, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, dtype: str, back: str
) -> None:
    """Sends x [T, H] to shard 0; every token has at least one slot in ids [T, K] (-1 for none)."""
    work = split((ids < 0).int().numpy(), 2)[0]
    message = Dispatch(1, 0, layer, dtype, back, len(x), int(work.counts.sum()))
    views = transport.prepare(0, message, time.monotonic() + 60)
    views.counts[:] = work.counts
    views.slot_ids[:] = ids.flatten()[work.pair_idx].numpy()
    views.weights[:] = weights.flatten()[work.pair_idx].numpy()
    if dtype == "fp8":
        quantized = reference.quantize_tokens(x)
        assert views.scales is not None
        views.scales[:] = quantized.scale_inv.numpy()
        x = quantized.q
    views.rows[:] = to_raw(x, dtype)
    transport.dispatch(0)


def check(family: str, rows: torch.Tensor, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor,
          experts: reference.Experts) -> None:  # fmt: skip
    exact = reference.experts_forward(x.double(), ids, weights, experts)
    assert torch.isfinite(rows).all()
    assert error(rows, exact) < EXACT[family]
    if family == "deepseek_v3":
        # The kernel rounds the intermediate from float32, the reference from float64: a code at a boundary may differ.
        assert error(rows, reference.experts_forward(x.double(), ids, weights, experts, True)) < 1.5e-2


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def routing(num_tokens: int, hidden: int, one_slot: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.rand(num_tokens, SLOTS).topk(TOP_K).indices.int()
    ids[torch.rand(num_tokens) < 0.5, 1] = -1
    if one_slot:
        ids[:, 0], ids[:, 1] = 2, -1
    return torch.randn(num_tokens, hidden).bfloat16(), ids, torch.rand(num_tokens, TOP_K)


@pytest.mark.parametrize("one_slot", [False, True])
@pytest.mark.parametrize(("dtype", "back"), [("bf16", "f32"), ("fp8", "bf16")])
@pytest.mark.parametrize("num_tokens", [1, 3, 64, PASS_TOKENS, 2 * PASS_TOKENS + 5])
@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])
def test_partials_are_the_reference_s(family: str, num_tokens: int, dtype: str, back: str, one_slot: bool) -> None:
    case = held(family)
    assert case.shard.compute_path == "triton" and current_device().name in case.shard.compute_reason
    hidden = SIZES[family][0]
    transport = LocalTransport([case.shard], hidden, TOP_K, max_tokens=num_tokens)
    x, ids, weights = routing(num_tokens, hidden, one_slot)
    if dtype == "fp8":  # what the shard is given is what was sent
        quantized = reference.quantize_tokens(x)
        x = reference.dequantize_tokens(quantized.q, quantized.scale_inv).bfloat16()
    for layer in range(LAYERS):
        ask(transport, layer, x, ids, weights, dtype, back)
        rows = transport.receive(time.monotonic() + 60).rows
        assert rows.dtype == (torch.float32 if back == "f32" else torch.bfloat16)
        check(family, rows, layer, x, ids, weights, case.dense[layer])


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])
def test_without_tokens_or_slots_there_are_zeros(family: str) -> None:
    shard, hidden = held(family).shard, SIZES[family][0]
    for num_tokens in (0, 3):
        x, ids, weights = routing(num_tokens, hidden, False)
        assert torch.equal(shard.forward(0, x, ids * 0 - 1, weights), torch.zeros(num_tokens, hidden))


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])
def test_requests_that_wait_for_one_layer_are_computed_together(family: str, tmp_path: Path) -> None:
    case, hidden = held(family, SlowShard), SIZES[family][0]
    endpoint = case.shard.listen(KEY, NODE, unix_dir=tmp_path / "s")
    greetings = [Greeting.of(case.shard.spec, str(idx), 64) for idx in range(4)]
    transports = [SocketTransport([endpoint], greeting, KEY, NODE) for greeting in greetings]
    cases = [routing(num_tokens, hidden, False) for num_tokens in (1, 7, 64, 30)]
    for transport, (x, ids, weights), back in zip(transports, cases, ("f32", "bf16", "f32", "f32")):
        ask(transport, 1, x, ids, weights, "bf16", back)
    for transport, (x, ids, weights) in zip(transports, cases):
        check(family, transport.receive(time.monotonic() + 60).rows, 1, x, ids, weights, case.dense[1])
        transport.close()
    stats = case.shard.stats()
    assert stats.requests == 4 and stats.coalesced >= 2 and stats.failed == 0
    case.shard.close()


def test_loading_takes_the_slots_and_little_more() -> None:
    layers = make_layers("deepseek_v3")
    spec, placement = make_spec("deepseek_v3"), even_split(LAYERS, SLOTS, 1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    shard = Shard(spec, placement, 0, layers, max_pass_tokens=1)
    peak = torch.cuda.max_memory_allocated() - before
    assert shard.stats().slot_bytes <= peak <= 1.25 * shard.stats().slot_bytes


def test_a_checkpoint_is_kept_as_it_is_stored(tmp_path: Path) -> None:
    if current_device().fp8_dtype is None:
        pytest.skip("no FP8 matrix units")
    checkpoint = Checkpoint(small_checkpoint(tmp_path, "deepseek_v3", small_config("deepseek_v3", hidden_size=256)))
    spec = checkpoint.spec
    placement = even_split(spec.num_moe_layers, spec.num_experts, 2)
    shard = Shard.load(checkpoint, placement, 1, max_pass_tokens=32)
    assert shard.stats().slot_bytes == placement.slots_per_shard * spec.expert_bytes * spec.num_moe_layers
    on_cpu = Shard.load(checkpoint, placement, 1, dtype=torch.float32, device="cpu")
    x, weights = torch.randn(20, 256).bfloat16(), torch.rand(20, spec.top_k)
    ids = torch.rand(20, placement.slots_per_shard).topk(spec.top_k).indices.int()
    assert error(shard.forward(0, x, ids, weights), on_cpu.forward(0, x, ids, weights).double()) < 7e-2


def test_what_no_kernel_supports_is_refused_before_anything_is_read() -> None:
    def never() -> Iterator[SlotWeights]:
        pytest.fail("weights were read")
        yield

    spec = ModelSpec.from_config(small_config("deepseek_v3"), "a/config.json")
    before = torch.cuda.memory_allocated()
    with pytest.raises(ModelError, match=r"a/config.json: .* hidden size is 192, expected a multiple of 128"):
        Shard(spec, even_split(spec.num_moe_layers, spec.num_experts, 1), 0, never())
    assert torch.cuda.memory_allocated() == before

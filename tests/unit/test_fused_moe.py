"""The fused MoE against the torch twin in the interpreter, and what it refuses."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep.kernels import permute, reference
from ep.kernels.devices import Device
from ep.kernels.fused_moe import HOST, ExpertShape, Workspace, fused_moe, supports
from ep.kernels.quant import quantize_tokens
from ep.kernels.tuning import TileConfig
from tests.unit.kernel_cases import Case, make_case, on_cpu

BLACKWELL = Device("NVIDIA_B200", "sm_100", units=148, shared_bytes=227 << 10)
HOPPER = Device("NVIDIA_H200", "sm_90", units=132, shared_bytes=227 << 10)
MI300X = Device("AMD_Instinct_MI300X", "gfx942", units=304, shared_bytes=64 << 10)
SLOTS = 5
SMALL = TileConfig(16)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # dropped rows compute on poison
cached_case = cache(make_case)


def run(
    case: Case, x: torch.Tensor, slot_ids: torch.Tensor, topk_weights: torch.Tensor, *, layer: int = 0,
    num_tokens: int | None = None, config: TileConfig = SMALL, device: Device = HOST, prequantized: bool = False,
) -> torch.Tensor:  # fmt: skip
    """One call with poisoned work space and output."""
    workspace = Workspace.allocate(case.weights, *slot_ids.shape)
    for field in fields(workspace):
        tensor = getattr(workspace, field.name)
        if tensor is not None:
            tensor.view(torch.uint8).fill_(0x7F)
    out = torch.full(x.shape, float("nan"), dtype=torch.bfloat16)
    return fused_moe(
        quantize_tokens(x, case.weights.shape.dtype) if prequantized else x, case.weights, slot_ids, topk_weights,
        layer_idx=torch.tensor([layer], dtype=torch.int32),
        num_tokens=torch.tensor([len(x) if num_tokens is None else num_tokens], dtype=torch.int32),
        out=out, workspace=workspace, config=config, device=device,
    )  # fmt: skip


def expected(
    case: Case, x: torch.Tensor, slot_ids: torch.Tensor, topk_weights: torch.Tensor, layer: int = 0
) -> torch.Tensor:
    """The twin, its activations rounded to the weights' flavour of e4m3 as the kernel rounds them."""
    shape = case.weights.shape
    out = torch.zeros_like(x, dtype=torch.float32)
    for slot in range(shape.num_slots):
        token, choice = (slot_ids == slot).nonzero(as_tuple=True)
        gate_up, down = case.dense[layer].w13[slot], case.dense[layer].w2[slot]
        gate, up = (rounded(x[token].float(), shape) @ gate_up.T).chunk(2, dim=-1)
        y = rounded(torch.nn.functional.silu(gate) * up, shape) @ down.T
        out.index_add_(0, token, y * topk_weights[token, choice, None])
    return out


def rounded(x: torch.Tensor, shape: ExpertShape) -> torch.Tensor:
    if not shape.quantized:
        return x
    quantized = reference.quantize_tokens(x, shape.dtype)
    return reference.dequantize_tokens(quantized.q, quantized.scale_inv)


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert torch.isfinite(got).all()
    assert (got.float() - wanted).norm() <= 6e-3 * wanted.norm()


@on_cpu
@settings(max_examples=12)
@given(
    dtype=st.sampled_from([torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.bfloat16]),
    device=st.sampled_from([HOST, BLACKWELL]),
    block_m=st.sampled_from([16, 32, 64]),
    group_m=st.sampled_from([1, 2]),
    top_k=st.integers(1, 3),
    layer=st.integers(0, 1),
    routing=st.lists(st.integers(-1, SLOTS), max_size=30),
    dropped=st.integers(0, 3),
)
def test_any_routing_gives_the_twins_sum(
    dtype: torch.dtype,
    device: Device,
    block_m: int,
    group_m: int,
    top_k: int,
    layer: int,
    routing: list[int],
    dropped: int,
) -> None:
    """Ids of -1 and past the last slot are other shards'; so are whole tokens past num_tokens."""
    case = cached_case(dtype, num_slots=SLOTS)
    capacity = len(routing) // top_k
    slot_ids = torch.tensor(routing[: capacity * top_k], dtype=torch.int32).view(capacity, top_k)
    count = max(0, capacity - dropped)
    x = torch.randn(capacity, 256).bfloat16()
    topk_weights = torch.rand(capacity, top_k)
    config = TileConfig(block_m, 64 if dtype.itemsize == 2 else 128, 64, group_m)
    got = run(case, x, slot_ids, topk_weights, layer=layer, num_tokens=count, config=config, device=device)
    assert torch.isnan(got[count:]).all()
    assert_close(got[:count], expected(case, x[:count], slot_ids[:count], topk_weights[:count], layer))


@on_cpu
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("slots", [[3], [-1], [0, 4], [SLOTS, 2]])
def test_crowded_and_empty_slots(slots: list[int], top_k: int) -> None:
    case = cached_case(torch.float8_e4m3fn, num_slots=SLOTS)
    slot_ids = torch.tensor(slots, dtype=torch.int32).repeat(36)[: 18 * top_k].view(18, top_k)
    x, topk_weights = torch.randn(18, 256).bfloat16(), torch.rand(18, top_k)
    got = run(case, x, slot_ids, topk_weights)
    assert_close(got, expected(case, x, slot_ids, topk_weights))
    assert (got[(slot_ids < 0).all(dim=1)] == 0).all()


@on_cpu
def test_the_two_pass_count_places_rows_as_one_pass_does(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cached_case(torch.float8_e4m3fn, num_slots=SLOTS)
    slot_ids = torch.randint(-1, SLOTS, (60, 2), dtype=torch.int32)
    x, topk_weights = torch.randn(60, 256).bfloat16(), torch.rand(60, 2)
    one_pass = run(case, x, slot_ids, topk_weights, num_tokens=55)
    monkeypatch.setattr(permute, "MAX_ONE_PASS_ASSIGNMENTS", 100)
    two_passes = run(case, x, slot_ids, topk_weights, num_tokens=55)
    assert torch.equal(one_pass[:55], two_passes[:55])


@on_cpu
def test_tokens_quantised_by_the_sender_give_the_same_bits() -> None:
    case = cached_case(torch.float8_e4m3fn, num_slots=SLOTS)
    slot_ids = torch.randint(-1, SLOTS, (9, 2), dtype=torch.int32)
    x, topk_weights = torch.randn(9, 256).bfloat16(), torch.rand(9, 2)
    assert torch.equal(*(run(case, x, slot_ids, topk_weights, prequantized=sent) for sent in (False, True)))


@given(counts=st.lists(st.integers(0, 200), min_size=1, max_size=20), block_m=st.sampled_from([16, 32, 64, 128]))
def test_row_blocks_never_exceed_their_bound(counts: list[int], block_m: int) -> None:
    blocks = sum(-(-count // block_m) for count in counts)
    assert blocks <= permute.max_row_blocks(sum(counts), len(counts), block_m)


SHAPE = ExpertShape(58, 32, 7168, 2048, torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("shape", "device", "reason"),
    [
        (SHAPE, HOPPER, "ok"),
        (replace(SHAPE, dtype=torch.bfloat16), MI300X, "ok"),
        (replace(SHAPE, dtype=torch.float8_e4m3fnuz), MI300X, "ok"),
        (
            SHAPE,
            MI300X,
            "weights are torch.float8_e4m3fn, AMD_Instinct_MI300X (gfx942) computes in torch.float8_e4m3fnuz",
        ),
        (replace(SHAPE, hidden=7100), HOPPER, "hidden size is 7100, expected a multiple of 128"),
        (replace(SHAPE, intermediate=2000), HOPPER, "intermediate size is 2000, expected a multiple of 128"),
        (replace(SHAPE, dtype=torch.float16), HOPPER, "weights are torch.float16, expected"),
        (replace(SHAPE, num_slots=20000), HOPPER, "2^31 weight rows"),
        (SHAPE, Device("NVIDIA_A100", "sm_80", 108, 163 << 10), "NVIDIA_A100 (sm_80) has no FP8 matrix units"),
        (replace(SHAPE, dtype=torch.bfloat16), Device("T4", "sm_75", 40, 64 << 10), "no bfloat16 matrix units"),
    ],
)
def test_supports_says_why_not(shape: ExpertShape, device: Device, reason: str) -> None:
    supported, why = supports(shape, device)
    assert supported == (reason == "ok")
    assert reason in why


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.zeros(4, 128).bfloat16()}, r"x is \(4, 128\)"),
        ({"x": torch.zeros(4, 256)}, "x is .* torch.float32"),
        ({"slot_ids": torch.zeros(4, 2).long()}, "slot_ids is .* torch.int64"),
        ({"topk_weights": torch.zeros(2, 4).T}, "topk_weights is .* not contiguous"),
        ({"out": torch.zeros(3, 256).bfloat16()}, r"out is \(3, 256\)"),
        ({"capacity": 3}, "the workspace has room for 6 in all"),
    ],
)
def test_operands_that_would_be_misread_are_refused(change: dict[str, torch.Tensor | int], reason: str) -> None:
    case = cached_case(torch.float8_e4m3fn, num_slots=SLOTS)
    good = {
        "x": torch.zeros(4, 256).bfloat16(),
        "slot_ids": torch.zeros(4, 2, dtype=torch.int32),
        "topk_weights": torch.zeros(4, 2),
        "out": torch.zeros(4, 256).bfloat16(),
        "capacity": 4,
    }
    used = good | change
    scalar = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=reason):
        fused_moe(
            used["x"], case.weights, used["slot_ids"], used["topk_weights"], layer_idx=scalar, num_tokens=scalar,
            out=used["out"], workspace=Workspace.allocate(case.weights, used["capacity"], 2), config=TileConfig(16),
        )  # fmt: skip

"""The kernels on a real GPU, at the true shapes of DeepSeek-V3, against float64.

Random data, different in every run; outputs and work space are poisoned before each call. `small` marks what is small
enough for compute-sanitizer: compute-sanitizer --error-exitcode 9 python -m pytest tests/gpu -k small
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch

from ep.kernels import gating, quant, reference, slots
from ep.kernels.devices import current_device
from ep.kernels.fused_moe import ExpertShape, ExpertWeights, Workspace, fused_moe
from ep.kernels.tuning import TileConfig, default_tile

BLOCKS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Rule:
    top_k: int = 8
    num_groups: int = 8
    topk_groups: int = 4
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    scoring: str = "sigmoid"


def make_weights(shape: ExpertShape) -> ExpertWeights:
    from ep.bench.moe_case import random_weights

    return random_weights(shape)


def quantized_dtype() -> torch.dtype:
    dtype = current_device().fp8_dtype
    if dtype is None:
        pytest.skip("no FP8 matrix units")
    return dtype


@pytest.fixture(scope="module")
def weights() -> ExpertWeights:
    return make_weights(ExpertShape(2, 4, 7168, 2048, quantized_dtype()))


def dense(weight: torch.Tensor, scale_inv: torch.Tensor | None) -> torch.Tensor:
    if scale_inv is None:
        return weight.double()
    scales = scale_inv.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return weight.double() * scales


def poison(workspace: Workspace) -> None:
    for field in fields(workspace):
        tensor = getattr(workspace, field.name)
        if tensor is not None:
            tensor.view(torch.uint8).fill_(0x7F)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def expert(weights: ExpertWeights, layer: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up_scale, down_scale = weights.gate_up_scale_inv, weights.down_scale_inv
    return (
        dense(weights.gate_up[layer, slot], None if gate_up_scale is None else gate_up_scale[layer, slot]),
        dense(weights.down[layer, slot], None if down_scale is None else down_scale[layer, slot]),
    )


def swiglu(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def check(weights: ExpertWeights, num_tokens: int, top_k: int, config: TileConfig, capacity: int | None = None) -> None:
    """One call, each of its stages against float64 on the operands that this stage had."""
    shape, layer = weights.shape, weights.shape.num_layers - 1
    capacity = capacity or num_tokens
    x = torch.randn(capacity, shape.hidden, device="cuda").bfloat16()
    slot_ids = torch.rand(capacity, shape.num_slots + top_k, device="cuda").topk(top_k).indices.int()
    slot_ids = torch.where(slot_ids < shape.num_slots, slot_ids, -1)
    topk_weights = torch.rand(capacity, top_k, device="cuda")
    workspace = Workspace.allocate(weights, capacity, top_k)
    poison(workspace)
    out = torch.full_like(x, float("nan"))
    fused_moe(
        x, weights, slot_ids, topk_weights, layer_idx=torch.tensor([layer], dtype=torch.int32, device="cuda"),
        num_tokens=torch.tensor([num_tokens], dtype=torch.int32, device="cuda"), out=out, workspace=workspace,
        config=config,
    )  # fmt: skip
    exact, staged = (torch.zeros(num_tokens, shape.hidden, dtype=torch.float64, device="cuda") for _ in range(2))
    start = 0
    for slot in range(shape.num_slots):
        token, choice = (slot_ids[:num_tokens] == slot).nonzero(as_tuple=True)
        rows = slice(start, start + len(token))
        start = rows.stop
        if not len(token):
            continue
        assert torch.equal(workspace.row_assignment[rows], (token * top_k + choice).int())
        gate_up, down = expert(weights, layer, slot)
        inputs, inter = workspace.rows[rows].double(), workspace.inter[rows].double()
        if workspace.row_scales is not None and workspace.inter_scales is not None:
            inputs = inputs * workspace.row_scales[:, rows].T.double().repeat_interleave(128, 1)
            inter = inter * workspace.inter_scales[:, rows].T.double().repeat_interleave(128, 1)
        assert error(inter, swiglu(inputs, gate_up)) < (3e-2 if shape.quantized else 3e-3)
        row_weight = topk_weights[token, choice, None].double()
        exact.index_add_(0, token, swiglu(x[token].double(), gate_up) @ down.T * row_weight)
        staged.index_add_(0, token, inter @ down.T * row_weight)
    assert torch.isfinite(out[:num_tokens]).all()
    assert torch.isnan(out[num_tokens:]).all()
    assert error(out[:num_tokens], staged) < 2e-3
    # The format's own error, which few and short rows average less.
    assert error(out[:num_tokens], exact) < (5e-3 if not shape.quantized else 5e-2 if shape.hidden > 4096 else 7e-2)


def tile(block_m: int, quantized: bool = True, group_m: int = 1) -> TileConfig:
    return replace(default_tile(block_m, current_device(), quantized), group_m=group_m)


@pytest.mark.parametrize("block_m", BLOCKS)
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (7, 1), (130, 1), (1000, 1), (1, 8), (77, 3), (900, 8)])
def test_fp8_experts_of_true_size(weights: ExpertWeights, num_tokens: int, top_k: int, block_m: int) -> None:
    check(weights, num_tokens, top_k, tile(block_m, group_m=4 if num_tokens > 100 else 1))


def test_two_pass_count(weights: ExpertWeights) -> None:
    check(weights, 6000, 1, tile(128, group_m=4), capacity=6100)


@pytest.mark.parametrize("block_m", BLOCKS)
def test_bf16_experts_of_mixtral_size(block_m: int) -> None:
    check(make_weights(ExpertShape(1, 8, 4096, 14336, torch.bfloat16)), 150, 2, tile(block_m, quantized=False))


@pytest.mark.parametrize("block_m", BLOCKS)
@pytest.mark.parametrize(("num_tokens", "top_k"), [(0, 1), (3, 1), (150, 4)])
def test_small(num_tokens: int, top_k: int, block_m: int) -> None:
    check(make_weights(ExpertShape(2, 5, 1024, 512, quantized_dtype())), num_tokens, top_k, tile(block_m), capacity=200)


def test_small_all_tokens_on_one_slot_and_none_at_all() -> None:
    weights = make_weights(ExpertShape(1, 5, 512, 256, quantized_dtype()))
    x = torch.randn(40, 512, device="cuda").bfloat16()
    workspace = Workspace.allocate(weights, 40, 1)
    ones = torch.ones(40, 1, device="cuda")
    scalars = {
        "layer_idx": torch.zeros(1, dtype=torch.int32, device="cuda"),
        "num_tokens": torch.tensor([40], dtype=torch.int32, device="cuda"),
    }
    for slot in (3, -1):
        out = torch.full_like(x, float("nan"))
        slot_ids = torch.full((40, 1), slot, dtype=torch.int32, device="cuda")
        fused_moe(x, weights, slot_ids, ones, out=out, workspace=workspace, config=tile(16), **scalars)
        if slot < 0:
            assert (out == 0).all()
        else:
            gate_up, down = expert(weights, 0, slot)
            assert error(out, swiglu(x.double(), gate_up) @ down.T) < 7e-2


@pytest.mark.parametrize("block_m", BLOCKS)
def test_one_graph_serves_every_layer_and_count(weights: ExpertWeights, block_m: int) -> None:
    capacity, config = 64, tile(block_m)
    x = torch.randn(capacity, 7168, device="cuda").bfloat16()
    slot_ids = torch.randint(-1, 4, (capacity, 2), dtype=torch.int32, device="cuda")
    topk_weights = torch.rand(capacity, 2, device="cuda")
    layer_idx, num_tokens = (torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(2))
    workspace = Workspace.allocate(weights, capacity, 2)
    out = torch.empty_like(x)

    def call(into: torch.Tensor) -> None:
        fused_moe(
            x, weights, slot_ids, topk_weights, layer_idx=layer_idx, num_tokens=num_tokens, out=into,
            workspace=workspace, config=config,
        )  # fmt: skip

    call(out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(out)
    for layer, count in ((0, 64), (1, 1), (1, 33), (0, 0)):
        layer_idx.fill_(layer)
        num_tokens.fill_(count)
        slot_ids.copy_(torch.randint(-1, 4, slot_ids.shape, device="cuda"))
        expected = torch.full_like(out, -7.0)
        call(expected)
        out.fill_(-7.0)
        graph.replay()
        assert torch.equal(out, expected)
        assert (out[count:] == -7.0).all()


def test_prequantized_tokens_give_the_same_bits(weights: ExpertWeights) -> None:
    x = torch.randn(50, 7168, device="cuda").bfloat16()
    slot_ids = torch.randint(0, 4, (50, 1), dtype=torch.int32, device="cuda")
    ones = torch.ones(50, 1, device="cuda")
    outs = []
    for tokens in (x, quant.quantize_tokens(x, weights.shape.dtype)):
        out = torch.full_like(x, float("nan"))
        fused_moe(
            tokens, weights, slot_ids, ones, layer_idx=torch.zeros(1, dtype=torch.int32, device="cuda"),
            num_tokens=torch.tensor([50], dtype=torch.int32, device="cuda"), out=out,
            workspace=Workspace.allocate(weights, 50, 1), config=tile(16),
        )  # fmt: skip
        outs.append(out)
    assert torch.equal(*outs)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 3e4])
def test_quantisation_chooses_the_twins_codes(scale: float) -> None:
    dtype = quantized_dtype()
    x = (torch.randn(1024, 7168, device="cuda") * scale).bfloat16()
    got, expected = quant.quantize_tokens(x, dtype), reference.quantize_tokens(x.cpu(), dtype)
    assert torch.equal(got.scale_inv.cpu(), expected.scale_inv)  # on the GPU torch multiplies by 1 / 448
    assert torch.equal(got.q.cpu().float(), expected.q.float())


@pytest.mark.parametrize("num_rows", [1, 32, 4096])
def test_slots_and_counts_of_true_size(num_rows: int) -> None:
    ids = torch.randint(0, 256, (num_rows, 8), dtype=torch.int32, device="cuda")
    slot_of = torch.stack([torch.randperm(256) for _ in range(58)]).int().cuda()
    sizes = torch.tensor([num_rows - num_rows // 8, num_rows // 3], dtype=torch.int32, device="cuda")
    counts = [torch.zeros(2, 58, 256, dtype=torch.int64, device="cuda") for _ in range(2)]
    for layer_pos in (0, 57, 57):
        got = slots.assign_slots(ids, slot_of, sizes, counts[0], layer_pos)
        assert torch.equal(got.slots, reference.assign_slots(ids, slot_of, sizes, counts[1], layer_pos))
        assert int(got.num_tokens) == num_rows - num_rows // 8
    assert torch.equal(*counts)


def test_gating_of_true_size() -> None:
    logits = torch.randn(4096, 256, device="cuda")
    bias = torch.randn(256, device="cuda") * 0.1
    got, expected = gating.route(logits, bias, Rule()), reference.route(logits, bias, Rule())
    agree = (got.topk_ids == expected.topk_ids).all(dim=1)
    assert agree.float().mean() > 0.999  # near-ties may fall either way
    torch.testing.assert_close(got.topk_weights[agree], expected.topk_weights[agree], rtol=1e-5, atol=1e-6)

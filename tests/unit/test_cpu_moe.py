"""Expert compute on CPU: every path against the reference, vLLM's own call and itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep.assign import split
from ep.kernels import cpu_moe, cpu_ops
from ep.kernels.reference import Experts, dequantize_blocks, experts_forward, quantize_blocks

H, N, E = 256, 128, 6
BLOCK = (128, 128)
FP8 = torch.float8_e4m3fn


def needs(path: cpu_ops.FusedPath) -> pytest.MarkDecorator:
    supported, reason = cpu_ops.supports(path, H, N, BLOCK)
    return pytest.mark.skipif(not supported, reason=reason)


def make_weights(dtype: torch.dtype, seed: int = 0) -> Experts:
    generator = torch.Generator().manual_seed(seed)
    w13 = torch.randn(E, 2 * N, H, generator=generator) / H**0.5
    w2 = torch.randn(E, H, N, generator=generator) / N**0.5
    return Experts(w13.to(dtype), w2.to(dtype))


def quantized(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    slots = [quantize_blocks(slot) for slot in weights]
    return torch.stack([slot.q for slot in slots]), torch.stack([slot.scale_inv for slot in slots])


def dequantized(weights: torch.Tensor) -> torch.Tensor:
    return torch.stack([dequantize_blocks(q, scale_inv) for q, scale_inv in zip(*quantized(weights), strict=True)])


WEIGHTS = {dtype: make_weights(dtype) for dtype in (torch.bfloat16, torch.float32)}
WEIGHTS[FP8] = Experts(dequantized(WEIGHTS[torch.float32].w13), dequantized(WEIGHTS[torch.float32].w2))


def packed(dtype: torch.dtype, path: cpu_moe.ComputePath) -> cpu_moe.PackedExperts:
    if path != "fp8":
        return cpu_moe.pack(WEIGHTS[dtype].w13.clone(), WEIGHTS[dtype].w2.clone(), path)
    (w13, w13_scale), (w2, w2_scale) = quantized(WEIGHTS[torch.float32].w13), quantized(WEIGHTS[torch.float32].w2)
    return cpu_moe.pack(w13, w2, path, scales=(w13_scale, w2_scale))


def make_job(
    dtype: torch.dtype, counts: list[int], seed: int, out_dtype: torch.dtype = torch.float32
) -> tuple[cpu_moe.Job, torch.Tensor]:
    """A job of one token per count, that many slots each, and the reference's answer in float64."""
    rng = np.random.default_rng(seed)
    width = max(counts)
    ids = np.full((len(counts), width), -1, dtype=np.int32)
    for token, count in enumerate(counts):
        ids[token, :count] = rng.permutation(E)[:count]
    weights = torch.from_numpy(rng.random((len(counts), width), dtype=np.float32))
    rows = torch.bfloat16 if dtype == FP8 else dtype
    x = torch.from_numpy(rng.standard_normal((len(counts), H), dtype=np.float32)).to(rows)
    work = split(np.where(ids < 0, 1, 0), 2)[0]
    token_idx = torch.from_numpy(work.token_idx)
    pairs = torch.from_numpy(work.pair_idx)
    job = cpu_moe.Job(
        x[token_idx],
        work.counts,
        torch.from_numpy(ids).flatten()[pairs],
        weights.flatten()[pairs],
        torch.full((len(token_idx), H), torch.nan, dtype=out_dtype),
    )
    wide = Experts(WEIGHTS[dtype].w13.double(), WEIGHTS[dtype].w2.double())
    wanted = experts_forward(x.double(), torch.from_numpy(ids), weights, wide)
    return job, wanted[token_idx]


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.double() - wanted).abs().max() / wanted.abs().max()).item()


counts_lists = st.lists(st.integers(1, E), min_size=1, max_size=30)
CASES = [
    pytest.param(torch.float32, "sorted_torch", 1e-5, id="float32-torch"),
    pytest.param(torch.bfloat16, "sorted_torch", 1.5e-2, id="bf16-torch"),
    pytest.param(torch.bfloat16, "vllm", 1.5e-2, id="bf16-vllm", marks=needs("vllm")),
    pytest.param(torch.bfloat16, "bf16", 1e-2, id="bf16-fused", marks=needs("bf16")),
    pytest.param(FP8, "fp8", 1.5e-2, id="fp8-fused", marks=needs("fp8")),
]


@pytest.mark.parametrize(("dtype", "path", "bound"), CASES)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=["to-f32", "to-bf16"])
@given(counts=counts_lists, seed=st.integers(0, 2**32))
@settings(max_examples=25)
def test_equals_reference(
    dtype: torch.dtype,
    path: cpu_moe.ComputePath,
    bound: float,
    out_dtype: torch.dtype,
    counts: list[int],
    seed: int,
) -> None:
    job, wanted = make_job(dtype, counts, seed, out_dtype)
    cpu_moe.moe(packed(dtype, path), [job])
    rounding = 0.0 if out_dtype == torch.float32 else 2**-8
    assert relative_error(job.out, wanted) <= bound + rounding


@needs("vllm")
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 33])
@pytest.mark.parametrize("num_slots", [1, 2, 4, E])
def test_uniform_jobs_have_the_bits_of_vllms_call(num_tokens: int, num_slots: int) -> None:
    """As vLLM's CPU experts call the op, on weights that were packed in one piece."""
    weights = WEIGHTS[torch.bfloat16]
    isa = cpu_ops.isa()
    w13, w2 = torch.empty_like(weights.w13), torch.empty_like(weights.w2)
    torch.ops._C.prepack_moe_weight(weights.w13, w13, isa)
    torch.ops._C.prepack_moe_weight(weights.w2, w2, isa)
    job, _ = make_job(torch.bfloat16, [num_slots] * num_tokens, seed=num_tokens, out_dtype=torch.bfloat16)
    ids, topk_weights = (pairs.view(num_tokens, num_slots) for pairs in (job.slot_ids, job.weights))
    native = torch.empty_like(job.x)
    torch.ops._C.cpu_fused_moe(native, job.x, w13, w2, None, None, topk_weights, ids, False, "silu", isa)
    cpu_moe.moe(packed(torch.bfloat16, "vllm"), [job])
    assert torch.equal(job.out, native)


BY_ROW = [case for case in CASES if case.id != "fp8-fused"]
"""That op takes another kernel, with other rounding, where a slot has more rows."""


@pytest.mark.parametrize(("dtype", "path", "bound"), BY_ROW)
@given(batches=st.lists(counts_lists, min_size=2, max_size=4), seed=st.integers(0, 2**32))
@settings(max_examples=25)
def test_jobs_that_come_together_have_the_bits_they_have_alone(
    dtype: torch.dtype, path: cpu_moe.ComputePath, bound: float, batches: list[list[int]], seed: int
) -> None:
    experts = packed(dtype, path)
    alone = [make_job(dtype, counts, seed + idx)[0] for idx, counts in enumerate(batches)]
    for job in alone:
        cpu_moe.moe(experts, [job])
    together = [make_job(dtype, counts, seed + idx)[0] for idx, counts in enumerate(batches)]
    cpu_moe.moe(experts, together)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.out, other.out)


@needs("fp8")
@given(batches=st.lists(counts_lists, min_size=2, max_size=4), seed=st.integers(0, 2**32))
@settings(max_examples=25)
def test_fp8_jobs_that_come_together_are_the_reference_s(batches: list[list[int]], seed: int) -> None:
    jobs = [make_job(FP8, counts, seed + idx) for idx, counts in enumerate(batches)]
    cpu_moe.moe(packed(FP8, "fp8"), [job for job, _ in jobs])
    for job, wanted in jobs:
        assert relative_error(job.out, wanted) <= 1.5e-2  # AMX tiles take weights widened to bf16


@pytest.mark.parametrize(
    ("dtype", "path", "op"),
    [
        pytest.param(torch.bfloat16, "vllm", "prepack", marks=needs("vllm")),
        pytest.param(torch.bfloat16, "bf16", "convert", marks=needs("bf16")),
        pytest.param(FP8, "fp8", "convert", marks=needs("fp8")),
    ],
)
def test_packing_slot_by_slot_in_place_equals_packing_at_once(
    dtype: torch.dtype, path: cpu_ops.FusedPath, op: str
) -> None:
    weights = WEIGHTS[torch.bfloat16].w13.to(dtype)
    whole = torch.empty_like(weights)
    if op == "prepack":
        torch.ops._C.prepack_moe_weight(weights, whole, cpu_ops.isa())
    else:
        whole = torch.ops._C.convert_weight_packed(weights)
    ours = weights.clone()
    cpu_ops.pack(ours, path)
    assert torch.equal(ours.view(torch.uint8), whole.view(torch.uint8))


@pytest.mark.parametrize(
    ("dtype", "hidden", "inter", "block", "reason"),
    [
        (torch.float32, 64, 32, None, "float32"),
        (torch.float16, 64, 32, None, "float16"),
        (torch.bfloat16, 48, 32, None, "hidden 48"),
        (torch.bfloat16, 64, 24, None, "intermediate 24"),
        (FP8, 256, 64, BLOCK, "intermediate 64"),
        (FP8, 256, 128, (64, 64), "(64, 64)"),
    ],
)
def test_what_the_ops_cannot_do_is_left_to_torch_with_the_reason(
    dtype: torch.dtype, hidden: int, inter: int, block: tuple[int, int] | None, reason: str
) -> None:
    choice = cpu_moe.choose(dtype, hidden, inter, block)
    assert choice.path == "sorted_torch" and reason in choice.reason


def test_scratch_grows_and_keeps_its_memory() -> None:
    scratch = cpu_moe.Scratch()
    big = scratch.rows("a", (1000, 8), torch.float32)
    small = scratch.rows("a", (10, 8), torch.float32)
    assert small.shape == (10, 8) and small.data_ptr() == big.data_ptr()
    assert scratch.rows("a", (10, 8), torch.bfloat16).dtype == torch.bfloat16
    assert scratch.rows("b", (10, 8), torch.float32).data_ptr() != small.data_ptr()

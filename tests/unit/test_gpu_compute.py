"""The GPU's way to compute a shard's experts: requests into passes and tables, and the kernels, interpreted."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ep.checkpoint import SlotWeights
from ep.compute.base import Work
from ep.compute.choose import keeps_quantized, open_compute
from ep.compute.gpu import GpuCompute, supports
from ep.compute.passes import pair_table, passes
from ep.errors import ModelError, OptionError
from ep.kernels import cpu_ops, reference
from ep.kernels.devices import Device
from ep.kernels.fused_moe import ExpertWeights
from ep.model import ModelSpec
from tests.cases import small_config
from tests.unit.kernel_cases import Case, make_case, on_cpu

ADA = Device("a GPU", "sm_89", units=4, shared_bytes=99 << 10)
AMPERE = Device("an older GPU", "sm_80", units=4, shared_bytes=99 << 10)
TURING = Device("a GPU older still", "sm_75", units=4, shared_bytes=64 << 10)
MI300X = Device("AMD_Instinct_MI300X", "gfx942", units=304, shared_bytes=64 << 10)
CPU = torch.device("cpu")
SLOTS, HIDDEN, TOP_K = 4, 256, 3
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # dropped rows compute on whatever lies there


def make_spec(family: str, **changes: int) -> ModelSpec:
    inner = "moe_intermediate_size" if family == "deepseek_v3" else "intermediate_size"
    experts = {"deepseek_v3": {"first_k_dense_replace": 0, "num_experts_per_tok": TOP_K}, "mixtral": {}}[family]
    return ModelSpec.from_config(
        small_config(family, **{"hidden_size": HIDDEN, inner: 128, **experts, **changes}), "a/config.json"
    )


def make_work(counts: list[int], seed: int, dtype: str = "bf16", out_dtype: torch.dtype = torch.float32) -> Work:
    """Each token's slots are distinct, as a router's are."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(counts), HIDDEN, generator=generator)
    scales = None
    if dtype == "fp8":
        quantized = reference.quantize_tokens(rows)
        rows, scales = quantized.q, quantized.scale_inv
    slots = [torch.randperm(SLOTS, generator=generator)[:count] for count in counts]
    return Work(
        rows if dtype != "bf16" else rows.bfloat16(),
        scales,
        np.array(counts, dtype=np.int32),
        torch.cat(slots).int().numpy(),
        torch.rand(sum(counts), generator=generator).numpy(),
        torch.full((len(counts), HIDDEN), float("nan"), dtype=out_dtype),
    )


def layers_of(weights: ExpertWeights) -> list[SlotWeights]:
    scales = (weights.gate_up_scale_inv, weights.down_scale_inv)
    return [
        SlotWeights(weights.gate_up[layer], weights.down[layer], *(None if s is None else s[layer] for s in scales))
        for layer in range(weights.shape.num_layers)
    ]


def expected(case: Case, layer: int, work: Work) -> torch.Tensor:
    """By the twin, token after token, from the CSR form itself; float32 rows are bf16 before they are quantised."""
    rows = work.rows.bfloat16().float() if work.scales is None else reference.dequantize_tokens(work.rows, work.scales)
    ids = torch.full((len(rows), SLOTS), -1)
    weights = torch.zeros(len(rows), SLOTS)
    pair = 0
    for token, count in enumerate(work.counts.tolist()):
        ids[token, :count] = torch.from_numpy(work.slot_ids[pair : pair + count])
        weights[token, :count] = torch.from_numpy(work.weights[pair : pair + count])
        pair += count
    return reference.experts_forward(rows, ids, weights, case.dense[layer], case.weights.shape.quantized)


COUNTS = st.lists(st.integers(1, TOP_K), min_size=1, max_size=12)


@given(st.lists(COUNTS, min_size=1, max_size=4), st.integers(0, 99))
def test_the_table_holds_every_pair_in_its_token_s_row(batches: list[list[int]], seed: int) -> None:
    works = [make_work(counts, seed + idx) for idx, counts in enumerate(batches)]
    table = pair_table(works, TOP_K)
    most = max(count for counts in batches for count in counts)
    assert table.slot_ids.shape[1] == {1: 1, 2: 2, 3: 3}[most] and table.slot_ids.dtype == np.int32
    row = 0
    for work in works:
        pair = 0
        for count in work.counts.tolist():
            assert table.slot_ids[row, :count].tolist() == work.slot_ids[pair : pair + count].tolist()
            assert table.weights[row, :count].tolist() == work.weights[pair : pair + count].tolist()
            assert (table.slot_ids[row, count:] == -1).all() and (table.weights[row, count:] == 0).all()
            row, pair = row + 1, pair + count
    assert row == len(table.slot_ids)


@pytest.mark.parametrize(("most", "top_k", "width"), [(1, 8, 1), (3, 8, 4), (5, 8, 8), (5, 6, 6), (2, 2, 2)])
def test_the_table_has_one_of_few_widths(most: int, top_k: int, width: int) -> None:
    counts = np.array([most], dtype=np.int32)
    pairs = np.arange(most, dtype=np.int32), np.ones(most, dtype=np.float32)
    work = Work(torch.zeros(1, 1), None, counts, *pairs, torch.zeros(1, 1))
    assert pair_table([work], top_k).slot_ids.shape == (1, width)


@given(
    st.lists(st.tuples(COUNTS, st.sampled_from(["bf16", "fp8"])), min_size=1, max_size=5),
    st.integers(1, 14),
)
def test_passes_hold_every_token_once_in_order(batches: list[tuple[list[int], str]], max_tokens: int) -> None:
    works = [make_work(counts, seed=idx, dtype=dtype) for idx, (counts, dtype) in enumerate(batches)]
    groups = list(passes(works, max_tokens))
    for group in groups:
        assert 1 <= sum(len(part.counts) for part in group) <= max_tokens
        assert len({part.scales is None for part in group}) == 1
    parts = [part for group in groups for part in group]
    for name in ("counts", "slot_ids", "weights"):
        joined = [value for part in parts for value in getattr(part, name).tolist()]
        assert joined == [value for work in works for value in getattr(work, name).tolist()]
    for part in parts:
        part.out.copy_(part.rows.float())
    for work in works:
        assert torch.equal(work.out, work.rows.float())
        assert max_tokens < len(work.counts) or any(work is part for part in parts)
    for first, second in pairwise(groups):  # a pass ends only for want of room or at other rows
        together = sum(len(part.counts) for part in first) + len(second[0].counts)
        assert together > max_tokens or (first[0].scales is None) != (second[0].scales is None)


@on_cpu
@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])
def test_waiting_requests_get_the_twins_partials(family: str) -> None:
    """Of all kinds in one call, one of them larger than a pass."""
    case = make_case(torch.float8_e4m3fn if family == "deepseek_v3" else torch.bfloat16)
    compute = GpuCompute(make_spec(family), SLOTS, CPU, ADA, 3)
    for weights in layers_of(case.weights):
        compute.add_slots(weights)
    compute.finish()
    works = [
        make_work([1, 2, 1, 2], 0, "bf16", torch.float32),
        make_work([1], 1, "f32", torch.bfloat16),
        make_work([2, 1], 2, "fp8", torch.float32),
    ]
    compute.run(1, works)
    for work in works:
        wanted = expected(case, 1, work)
        assert torch.isfinite(work.out).all()
        assert (work.out.float() - wanted).norm() <= 8e-3 * wanted.norm()


def test_weights_and_tokens_become_what_the_device_multiplies() -> None:
    """gfx942: e4m3fnuz codes that stand for the same values, made once per layer."""
    case = make_case(torch.float8_e4m3fn)
    compute = GpuCompute(make_spec("deepseek_v3"), SLOTS, CPU, MI300X, 4)
    for weights in layers_of(case.weights):
        compute.add_slots(weights)
    ours = compute._weights
    assert ours.gate_up.dtype == ours.down.dtype == torch.float8_e4m3fnuz and ours.gate_up_scale_inv is not None
    for layer in range(2):
        for slot in range(SLOTS):
            values = reference.dequantize_blocks(ours.gate_up[layer, slot], ours.gate_up_scale_inv[layer, slot])
            assert torch.equal(values, case.dense[layer].w13[slot])
    work = make_work([1, 2], 0, "fp8")
    rows = compute._rows([work])
    assert isinstance(rows, reference.Quantized) and rows.q.dtype == torch.float8_e4m3fnuz and work.scales is not None
    wanted = reference.dequantize_tokens(work.rows, work.scales)
    assert torch.equal(reference.dequantize_tokens(rows.q, rows.scale_inv), wanted)


@pytest.mark.parametrize(
    ("family", "changes", "device", "reason"),
    [
        ("deepseek_v3", {"hidden_size": 192}, ADA, "hidden size is 192, expected a multiple of 128"),
        ("mixtral", {"intermediate_size": 96}, ADA, "intermediate size is 96, expected a multiple of 64"),
        ("deepseek_v3", {}, AMPERE, r"an older GPU \(sm_80\) has no FP8 matrix units"),
        ("mixtral", {}, TURING, r"\(sm_75\) has no bfloat16 matrix units"),
    ],
)
def test_what_no_kernel_supports_is_refused_with_the_reason(
    family: str, changes: dict[str, int], device: Device, reason: str
) -> None:
    spec = make_spec(family, **changes)
    assert not supports(spec, SLOTS, device)[0]
    with pytest.raises(ModelError, match=f"a/config.json: experts cannot be computed on .*: .*{reason}"):
        GpuCompute(spec, SLOTS, CPU, device, 16)


def test_other_scale_blocks_are_refused() -> None:
    config = small_config("deepseek_v3", hidden_size=HIDDEN, moe_intermediate_size=128)
    config["quantization_config"] = {**config["quantization_config"], "weight_block_size": [64, 64]}
    supported, reason = supports(ModelSpec.from_config(config, "x"), SLOTS, ADA)
    assert not supported and "(64, 64), expected (128, 128)" in reason


def test_the_reason_names_device_type_and_tiles() -> None:
    supported, reason = supports(make_spec("deepseek_v3"), SLOTS, MI300X)
    assert supported
    for part in ("float8_e4m3fnuz", "AMD_Instinct_MI300X (gfx942)", "E=4,N=2048,device_name=AMD_Instinct_MI300X"):
        assert part in reason


def test_only_cpus_and_gpus_compute() -> None:
    with pytest.raises(OptionError, match="shard device is meta, expected cpu or cuda"):
        open_compute(make_spec("mixtral"), SLOTS, torch.device("meta"), 16)


def test_fp8_is_kept_on_a_gpu_and_on_a_cpu_where_asked_for() -> None:
    fp8, bf16 = make_spec("deepseek_v3"), make_spec("mixtral")
    gpu = torch.device("cuda:0")
    assert [keeps_quantized(spec, at) for spec in (fp8, bf16) for at in (gpu, CPU)] == [True, False, False, False]
    if cpu_ops.supports("fp8", fp8.hidden_size, fp8.moe_intermediate_size, fp8.quant_block)[0]:
        assert keeps_quantized(fp8, CPU, fp8=True)
    with pytest.raises(ModelError, match="cannot stay FP8 on this CPU"):
        keeps_quantized(bf16, CPU, fp8=True)

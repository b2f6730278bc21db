"""What others do with the same experts and tokens, where they are installed: vLLM's Triton kernel and DeepGEMM's
GEMMs."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from ep.bench.moe_case import MoeCase

Call = Callable[[], object]


def vllm_fused_moe(case: MoeCase) -> Call | None:
    """vLLM's whole op (quantisation, sort, GEMMs, sum) with its own tuned config; None without vLLM."""
    if find_spec("vllm") is None:
        return None
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    weights = case.weights
    if not weights.shape.quantized:
        return None
    assert weights.gate_up_scale_inv is not None and weights.down_scale_inv is not None
    quant = fp8_w8a8_moe_quant_config(
        w1_scale=weights.gate_up_scale_inv[0], w2_scale=weights.down_scale_inv[0], block_shape=[128, 128]
    )

    def call() -> torch.Tensor:
        return fused_experts(
            case.x, weights.gate_up[0], weights.down[0], case.topk_weights, case.slot_ids, quant_config=quant
        )

    return call


def deep_gemm(case: MoeCase) -> Call | None:
    """DeepGEMM's two masked grouped GEMMs alone (no sort, no quantisation, no sum); None without it or off FP8."""
    shape = case.weights.shape
    if find_spec("vllm") is None or not shape.quantized:
        return None
    from vllm.utils import deep_gemm as library

    if not library.is_deep_gemm_supported():
        return None
    counts = torch.bincount(case.slot_ids.flatten().long(), minlength=shape.num_slots).int()
    capacity = max(64, -(-int(counts.max()) // 64) * 64)
    expected = max(1, case.slot_ids.numel() // shape.num_slots)
    assert case.weights.gate_up_scale_inv is not None and case.weights.down_scale_inv is not None

    def tokens(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = (shape.num_slots, capacity, columns)
        values = torch.randn(size, device=case.x.device).mul_(60).clamp_(-448, 448).to(shape.dtype)
        scales = torch.rand(shape.num_slots, capacity, columns // 128, device=case.x.device)
        return values, library.get_col_major_tma_aligned_tensor(scales)

    def output(columns: int) -> torch.Tensor:
        return torch.empty(shape.num_slots, capacity, columns, dtype=torch.bfloat16, device=case.x.device)

    x, gate_up_out = tokens(shape.hidden), output(2 * shape.intermediate)
    inter, down_out = tokens(shape.intermediate), output(shape.hidden)
    gate_up = (case.weights.gate_up[0], case.weights.gate_up_scale_inv[0])
    down = (case.weights.down[0], case.weights.down_scale_inv[0])

    def call() -> None:
        library.fp8_m_grouped_gemm_nt_masked(x, gate_up, gate_up_out, counts, expected)
        library.fp8_m_grouped_gemm_nt_masked(inter, down, down_out, counts, expected)

    return call

"""Experts and routings small enough for Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from ep.kernels import reference
from ep.kernels.fused_moe import ExpertWeights

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted kernels: tests/gpu has their like for a GPU")


@dataclass(frozen=True)
class Rule:
    """What `reference.GateRule` wants."""

    top_k: int
    num_groups: int = 1
    topk_groups: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    scoring: str = "softmax"


@dataclass(frozen=True)
class Case:
    """weights as a shard holds them, and the same as dense float32 for the twin, per layer."""

    weights: ExpertWeights
    dense: list[reference.Experts]


def make_case(
    dtype: torch.dtype,
    num_layers: int = 2,
    num_slots: int = 4,
    hidden: int = 256,
    intermediate: int = 128,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(num_layers, num_slots, 2 * intermediate, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(num_layers, num_slots, hidden, intermediate, generator=generator) * intermediate**-0.5
    if dtype.itemsize == 2:
        weights = ExpertWeights(gate_up.to(dtype), down.to(dtype))
        dense = zip(weights.gate_up.float(), weights.down.float())
        return Case(weights, [reference.Experts(*layer) for layer in dense])

    def quantize(stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        blocks = [reference.quantize_blocks(matrix, dtype=dtype) for matrix in stack.flatten(0, 1)]
        back = [reference.dequantize_blocks(block.q, block.scale_inv) for block in blocks]
        parts = ([block.q for block in blocks], [block.scale_inv for block in blocks], back)
        q, scale_inv, values = (torch.stack(part).unflatten(0, stack.shape[:2]) for part in parts)
        return q, scale_inv, values

    gate_up_q, gate_up_scale_inv, gate_up_values = quantize(gate_up)
    down_q, down_scale_inv, down_values = quantize(down)
    weights = ExpertWeights(gate_up_q, down_q, gate_up_scale_inv, down_scale_inv)
    return Case(weights, [reference.Experts(*layer) for layer in zip(gate_up_values, down_values)])

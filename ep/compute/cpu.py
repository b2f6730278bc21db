"""Experts on the CPU: by vLLM's C++ ops where they can, by plain torch elsewhere. FP8 stays FP8 where an op can."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ep.checkpoint import SlotWeights
from ep.compute.base import Work
from ep.kernels import cpu_moe
from ep.kernels.reference import dequantize_tokens
from ep.model import ModelSpec


def keeps_quantized(spec: ModelSpec) -> bool:
    """Whether an FP8 checkpoint's experts are best left FP8 on this processor."""
    return choose(spec, torch.float8_e4m3fn).path == "fp8"


def choose(spec: ModelSpec, dtype: torch.dtype) -> cpu_moe.Choice:
    """The path for the model's experts, read as `dtype`."""
    return cpu_moe.choose(dtype, spec.hidden_size, spec.moe_intermediate_size, spec.quant_block)


class CpuCompute:
    """An ExpertCompute; the path follows from the first layer's dtype."""

    def __init__(self, spec: ModelSpec) -> None:
        self._choice = cpu_moe.Choice("sorted_torch", "no layers yet")
        self._spec = spec
        self._scratch = cpu_moe.Scratch()
        self._layers: list[cpu_moe.PackedExperts] = []

    @property
    def path(self) -> str:
        return self._choice.path

    @property
    def reason(self) -> str:
        return self._choice.reason

    @property
    def slot_bytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers)

    def add_layer(self, weights: SlotWeights) -> None:
        if not self._layers:
            self._choice = choose(self._spec, weights.w13.dtype)
        scales = None
        if weights.w13_scale is not None and weights.w2_scale is not None:
            scales = (weights.w13_scale, weights.w2_scale)
        self._layers.append(cpu_moe.pack(weights.w13, weights.w2, self._choice.path, self._scratch, scales))

    def finish(self) -> None:
        """Nothing is compiled or allocated later."""

    def run(self, layer_pos: int, works: Sequence[Work]) -> None:
        experts = self._layers[layer_pos]
        cpu_moe.moe(experts, [_job(work, experts.dtype) for work in works])


def _job(work: Work, dtype: torch.dtype) -> cpu_moe.Job:
    rows = work.rows if work.scales is None else dequantize_tokens(work.rows, work.scales)
    return cpu_moe.Job(
        rows if rows.dtype == dtype else rows.to(dtype),
        work.counts,
        torch.from_numpy(work.slot_ids),
        torch.from_numpy(work.weights),
        work.out,
    )

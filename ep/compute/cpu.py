"""Experts on the CPU: bf16 (or float32) weights, by vLLM's C++ op where it can, by plain torch elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ep.checkpoint import SlotWeights
from ep.compute.base import Work
from ep.kernels import cpu_moe
from ep.kernels.reference import dequantize_tokens
from ep.model import ModelSpec


class CpuCompute:
    """An ExpertCompute; the path follows from the first layer's dtype."""

    def __init__(self, spec: ModelSpec) -> None:
        self._path: cpu_moe.ComputePath = "sorted_torch"
        self.reason = "no layers yet"
        self._spec = spec
        self._scratch = cpu_moe.Scratch()
        self._layers: list[cpu_moe.PackedExperts] = []

    @property
    def path(self) -> str:
        return self._path

    @property
    def slot_bytes(self) -> int:
        return sum(layer.w13.nbytes + layer.w2.nbytes for layer in self._layers)

    def add_layer(self, weights: SlotWeights) -> None:
        if not self._layers:
            supported, self.reason = cpu_moe.supports(
                weights.w13.dtype, self._spec.hidden_size, self._spec.moe_intermediate_size
            )
            self._path = "fused" if supported else "sorted_torch"
        self._layers.append(cpu_moe.pack(weights.w13, weights.w2, self._path, self._scratch))

    def finish(self) -> None:
        """Nothing is compiled or allocated later."""

    def run(self, layer_pos: int, works: Sequence[Work]) -> None:
        experts = self._layers[layer_pos]
        cpu_moe.moe(experts, [_job(work, experts.w13.dtype) for work in works])


def _job(work: Work, dtype: torch.dtype) -> cpu_moe.Job:
    rows = work.rows if work.scales is None else dequantize_tokens(work.rows, work.scales)
    return cpu_moe.Job(
        rows if rows.dtype == dtype else rows.to(dtype),
        work.counts,
        torch.from_numpy(work.slot_ids),
        torch.from_numpy(work.weights),
        work.out,
    )

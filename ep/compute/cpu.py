"""Experts on the CPU: by vLLM's C++ ops where they can, by plain torch elsewhere. FP8 stays FP8 where an op can."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from ep.checkpoint import SlotWeights
from ep.compute.base import Work
from ep.compute.host_experts import HostExperts
from ep.kernels import cpu_moe, cpu_ops
from ep.kernels.reference import dequantize_tokens
from ep.model import ModelSpec

_ops = threading.Lock()
"""vLLM's C++ ops have scratch memory that is the whole process's."""


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

    @property
    def slot_format(self) -> str:
        return f"{self.path} {cpu_ops.isa()}"

    def slot_parts(self, layer_pos: int, slot_idx: int) -> list[torch.Tensor]:
        layer = self._layers[layer_pos]
        return [part[slot_idx] for part in _tensors(layer)]

    def load_slot(self, layer_pos: int, slot_idx: int, weights: SlotWeights) -> None:
        packed = cpu_moe.pack(weights.w13, weights.w2, self._choice.path, scales=_scales(weights))
        for part, new in zip(self.slot_parts(layer_pos, slot_idx), _tensors(packed), strict=True):
            part.copy_(new[0])

    def add_slots(self, weights: SlotWeights) -> None:
        if not self._layers:
            self._choice = choose(self._spec, weights.w13.dtype)
        packed = cpu_moe.pack(weights.w13, weights.w2, self._choice.path, self._scratch, _scales(weights))
        self._layers.append(packed)

    def finish(self) -> None:
        """Nothing is compiled or allocated later."""

    def run(self, layer_pos: int, works: Sequence[Work]) -> None:
        experts = self._layers[layer_pos]
        jobs = [_job(work, experts.dtype) for work in works]
        with _ops:
            cpu_moe.moe(experts, jobs)

    def for_jobs(self, job_tokens: int, num_shards: int, is_hosted: bool = False) -> HostExperts:
        return HostExperts(self)


def _scales(weights: SlotWeights) -> tuple[torch.Tensor, torch.Tensor] | None:
    if weights.w13_scale is None or weights.w2_scale is None:
        return None
    return weights.w13_scale, weights.w2_scale


def _tensors(experts: cpu_moe.PackedExperts) -> tuple[torch.Tensor, ...]:
    return (experts.w13, experts.w2, *(experts.scales or ()))


def _job(work: Work, dtype: torch.dtype) -> cpu_moe.Job:
    rows = work.rows if work.scales is None else dequantize_tokens(work.rows, work.scales)
    return cpu_moe.Job(
        rows if rows.dtype == dtype else rows.to(dtype),
        work.counts,
        torch.from_numpy(work.slot_ids),
        torch.from_numpy(work.weights),
        work.out,
    )

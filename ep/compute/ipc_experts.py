"""Experts of a GPU's memory for the ipc server's jobs.

Shape legend: C rows of a job (capacity), K choices per token, H hidden.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from ep.kernels import fused_moe as op
from ep.kernels.devices import Device
from ep.kernels.p2p import Job
from ep.kernels.reference import Quantized

WAITS = 1
"""Programs of a router that wait at a time (kernels/p2p.py `wait_partials`)."""


class IpcExperts:
    """A JobCompute of a shard's slots. Its work space is its own: it may run beside other users of the weights.

    job_tokens: the largest job. num_shards: that the experts are split over, by which the tile for a job is chosen.
    is_hosted: a router of this process waits on the same device, on a multiprocessor of which jobs then keep clear: a
    program of a grouped GEMM takes a whole one, has its share of the tiles from the start, and would do it when all
    others have ended.
    """

    def __init__(
        self,
        weights: op.ExpertWeights,
        device: Device,
        top_k: int,
        job_tokens: int,
        num_shards: int,
        is_hosted: bool = False,
    ) -> None:
        self._weights = weights
        self._device = replace(device, units=device.units - WAITS) if is_hosted else device
        self._pairs = pairs_per_row(top_k, num_shards)
        self._workspace = op.Workspace.allocate(weights, job_tokens, top_k)

    @property
    def workspace_bytes(self) -> int:
        tensors = (getattr(self._workspace, field.name) for field in fields(self._workspace))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def __call__(self, job: Job, capacity: int, out: torch.Tensor) -> None:
        x: torch.Tensor | Quantized = job.rows[:capacity]
        if job.scales is not None:
            x = Quantized(job.rows[:capacity], job.scales[:capacity])
        op.fused_moe(
            x,
            self._weights,
            job.slot_ids[:capacity],
            job.weights[:capacity],
            layer_idx=job.layer_idx,
            num_tokens=job.num_tokens,
            out=out,
            workspace=self._workspace,
            config=op.choose_config(self._weights.shape, max(round(capacity * self._pairs), 1), self._device),
            device=self._device,
        )


def pairs_per_row(top_k: int, num_shards: int) -> float:
    """Pairs that a row brings to a shard if a token's experts are spread evenly: of tokens that have any there."""
    return top_k / num_shards / (1 - (1 - 1 / num_shards) ** top_k)

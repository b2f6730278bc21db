"""Experts of host memory for callers whose pairs are tables, as the ipc server's jobs.

Shape legend: T tokens, C rows of a job (capacity), K choices per token, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ep.compute.base import ExpertCompute, Work

if TYPE_CHECKING:
    from ep.kernels.p2p import Job


def run_table(
    compute: ExpertCompute,
    layer_pos: int,
    rows: torch.Tensor,
    scales: torch.Tensor | None,
    slot_ids: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """rows [T, H] (scales [T, ceil(H / 128)] if FP8), slot_ids int [T, K], -1 for none, weights float32 [T, K] -> out
    [T, H] float32 or bf16, the partials; zero for a token without slots."""
    taken = slot_ids >= 0
    counts = taken.sum(1)
    tokens = counts.nonzero().flatten()
    is_whole = len(tokens) == len(rows)
    if not is_whole:
        out.zero_()
        rows, counts = rows[tokens], counts[tokens]
        scales = None if scales is None else scales[tokens]
    if not len(tokens):
        return
    partials = out if is_whole else torch.empty(len(tokens), out.shape[1], dtype=out.dtype)
    pairs = slot_ids[taken].numpy().astype(np.int32), weights[taken].float().numpy()
    compute.run(layer_pos, [Work(rows, scales, counts.numpy().astype(np.int32), *pairs, partials)])
    if not is_whole:
        out[tokens] = partials


class HostExperts:
    """A JobCompute of slots that a CPU computes."""

    def __init__(self, compute: ExpertCompute) -> None:
        self._compute = compute

    def __call__(self, job: Job, capacity: int, out: torch.Tensor) -> None:
        num_tokens = int(job.num_tokens)
        if num_tokens:
            here, layer_pos = slice(num_tokens), int(job.layer_idx)
            scales = None if job.scales is None else job.scales[here]
            slot_ids, weights = job.slot_ids[here], job.weights[here]
            run_table(self._compute, layer_pos, job.rows[here], scales, slot_ids, weights, out[here])

"""Expert compute of one shard on CPU: the weighted sum of each token's experts among the shard's slots.

Shape legend: T tokens, H hidden, N intermediate, E slots, P pairs (token, slot), C slots of each token.
Pairs come in token order, counts[t] of them for token t (ep/wire.py), so slot_ids and weights are [P], P = sum(counts).

Paths: the ops of cpu_ops.py, which want the same number of experts for every token. Where a shard has just that, they
are called as vLLM calls them. Elsewhere each pair is a row of its own with one expert: a padded column costs a whole
expert row, and a call per distinct count reads the weights once per call (both measured slower at every batch size of
16 and up). The ops round each row to bf16, as vLLM's Triton kernel does; the rows are then summed in float32.
`sorted_torch` is the twin in plain torch, for other dtypes, shapes and processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ep.kernels import cpu_ops

ComputePath = Literal["fp8", "bf16", "vllm", "sorted_torch"]
"""The first three: ep.kernels.cpu_ops.FusedPath."""


@dataclass(frozen=True)
class Job:
    """Work of one request. x [T, H] of the weights' dtype, counts int [T], all at least 1, slot_ids int32 [P], weights
    float32 [P] (all contiguous), out [T, H] float32 or of the weights' dtype: the partials are written there."""

    x: torch.Tensor
    counts: npt.NDArray[np.integer]
    slot_ids: torch.Tensor
    weights: torch.Tensor
    out: torch.Tensor


@dataclass(frozen=True)
class PackedExperts:
    """Weights of one layer's slots in the order that `path` wants: w13 [E, 2N, H] (gate, then up), w2 [E, H, N].

    scales: of w13 and w2, float32, one per block, where they are FP8.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    path: ComputePath
    scratch: Scratch = field(repr=False)
    scales: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows that go in and come out."""
        return torch.bfloat16 if self.scales is not None else self.w13.dtype

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.w13, self.w2, *(self.scales or ())))


@dataclass(frozen=True)
class Choice:
    """How experts are computed, and why so."""

    path: ComputePath
    reason: str


class Scratch:
    """Rows reused between calls and layers: fresh large allocations cost page faults. For one thread."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def rows(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised [rows, columns], valid until the next call with this name."""
        num_rows, num_cols = shape
        buffer = self._buffers.get(name)
        if buffer is None or buffer.dtype != dtype or buffer.numel() < num_rows * num_cols:
            buffer = torch.empty(max(num_rows, 64) * num_cols, dtype=dtype)
            self._buffers[name] = buffer
        return buffer[: num_rows * num_cols].view(num_rows, num_cols)


def choose(
    dtype: torch.dtype, hidden_size: int, moe_intermediate_size: int, block: tuple[int, int] | None = None
) -> Choice:
    """The fastest path for weights of `dtype`; block: of the scales of FP8 weights."""
    paths: tuple[cpu_ops.FusedPath, ...] = ("fp8",) if dtype == torch.float8_e4m3fn else ("bf16", "vllm")
    if dtype not in (torch.float8_e4m3fn, torch.bfloat16):
        return Choice("sorted_torch", f"vLLM's C++ ops take FP8 and bf16 weights, these are {dtype}")
    reason = ""
    for path in paths:
        supported, reason = cpu_ops.supports(path, hidden_size, moe_intermediate_size, block)
        if supported:
            return Choice(path, reason)
    return Choice("sorted_torch", reason)


def pack(
    w13: torch.Tensor,
    w2: torch.Tensor,
    path: ComputePath,
    scratch: Scratch | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> PackedExperts:
    """Reorders w13 [E, 2N, H] and w2 [E, H, N] in place."""
    assert (scales is not None) == (path == "fp8")
    if path != "sorted_torch":
        for weights in (w13, w2):
            cpu_ops.pack(weights, path)
    return PackedExperts(w13, w2, path, scratch or Scratch(), scales)


def moe(experts: PackedExperts, jobs: Sequence[Job]) -> None:
    """Fills `out` of every job. Jobs of several requests share one pass over the weights.

    Which jobs come together leaves the bits as they are, but on the fp8 path, whose op rounds otherwise where a slot
    has more rows.
    """
    if experts.path == "sorted_torch":
        for job in jobs:
            sorted_torch(experts.w13, experts.w2, job)
        return
    ragged = []
    uniform: dict[int, list[Job]] = {}
    for job in jobs:
        num_slots = int(job.counts[0])
        if num_slots * len(job.counts) == len(job.slot_ids) and (job.counts == num_slots).all():
            uniform.setdefault(num_slots, []).append(job)
        else:
            ragged.append(job)
    for num_slots, group in uniform.items():
        _fused_uniform(experts, group, num_slots)
    if ragged:
        _fused_ragged(experts, ragged)


def sorted_torch(w13: torch.Tensor, w2: torch.Tensor, job: Job) -> None:
    """The twin: pairs sorted by slot, two GEMMs per slot that has any, weighted sum in float32."""
    rows = torch.from_numpy(_row_of_pair(job.counts))
    order = torch.argsort(job.slot_ids, stable=True)
    slots, counts = torch.unique_consecutive(job.slot_ids[order], return_counts=True)
    total = torch.zeros(job.out.shape, dtype=torch.float32)
    for slot, pairs in zip(slots.tolist(), order.split(counts.tolist()), strict=True):
        tokens = rows[pairs]
        gate, up = F.linear(job.x[tokens], w13[slot]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, w2[slot])
        total.index_add_(0, tokens, y.float() * job.weights[pairs, None])
    job.out.copy_(total)


def _fused_uniform(experts: PackedExperts, jobs: list[Job], num_slots: int) -> None:
    """[T, C] ids and weights: the op as vLLM calls it."""
    x = _cat(experts, [job.x for job in jobs])
    slot_ids = _joined([job.slot_ids for job in jobs]).view(-1, num_slots)
    weights = _joined([job.weights for job in jobs]).view(-1, num_slots)
    if len(jobs) == 1 and jobs[0].out.dtype == x.dtype:
        _op(jobs[0].out, x, experts, weights, slot_ids)
        return
    out = experts.scratch.rows("out", x.shape, x.dtype)
    _op(out, x, experts, weights, slot_ids)
    for job, part in zip(jobs, out.split([len(job.counts) for job in jobs]), strict=True):
        job.out.copy_(part)


def _fused_ragged(experts: PackedExperts, jobs: list[Job]) -> None:
    """One row per pair, one expert per row, then the rows of each token are added up in float32."""
    x = _cat(experts, [job.x for job in jobs])
    row_of_pair = torch.from_numpy(_row_of_pair(np.concatenate([job.counts for job in jobs])))
    slot_ids = _joined([job.slot_ids for job in jobs])
    weights = _joined([job.weights for job in jobs])
    shape = (len(slot_ids), x.shape[1])
    pairs = experts.scratch.rows("pairs", shape, x.dtype)
    torch.index_select(x, 0, row_of_pair, out=pairs)
    out = experts.scratch.rows("out", shape, x.dtype)
    _op(out, pairs, experts, weights[:, None], slot_ids[:, None])
    rows = experts.scratch.rows("rows", shape, torch.float32).copy_(out)
    if len(jobs) == 1 and jobs[0].out.dtype == torch.float32:
        jobs[0].out.zero_().index_add_(0, row_of_pair, rows)
        return
    total = experts.scratch.rows("total", x.shape, torch.float32).zero_().index_add_(0, row_of_pair, rows)
    for job, part in zip(jobs, total.split([len(job.counts) for job in jobs]), strict=True):
        job.out.copy_(part)


def _row_of_pair(counts: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    return np.arange(len(counts)).repeat(counts)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _cat(experts: PackedExperts, parts: list[torch.Tensor]) -> torch.Tensor:
    """The rows of all jobs."""
    if len(parts) == 1:
        return parts[0]
    shape = (sum(len(part) for part in parts), parts[0].shape[1])
    return torch.cat(parts, out=experts.scratch.rows("x", shape, parts[0].dtype))


def _op(
    out: torch.Tensor, x: torch.Tensor, experts: PackedExperts, weights: torch.Tensor, slot_ids: torch.Tensor
) -> None:
    assert experts.path != "sorted_torch"
    cpu_ops.run(out, x, experts.w13, experts.w2, experts.scales, weights, slot_ids, experts.path)

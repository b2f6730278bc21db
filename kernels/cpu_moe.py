"""Expert compute of one shard on CPU: the weighted sum of each token's experts among the shard's slots.

Shape legend: T tokens, H hidden, N intermediate, E slots, P pairs (token, slot), C slots of each token.
Pairs come in token order, counts[t] of them for token t (ep/wire.py), so slot_ids and weights are [P], P = sum(counts).

Two paths. `fused` is vLLM's C++ op, `_C::cpu_fused_moe`: its own kernel for the experts on CPU, loaded without
importing vLLM. It wants the same number of experts for every token. Where a shard has just that, it is called as vLLM
calls it and gives the same bits. Elsewhere each pair is a row of its own with one expert: a padded column costs a whole
expert row, and a call per distinct count reads the weights once per call (both measured slower at every batch size of
16 and up). The op rounds each row to bf16, as vLLM's Triton kernel does; the rows are then summed in float32.
`sorted_torch` is the twin in plain torch, for other dtypes, shapes and processors.
"""

from __future__ import annotations

import importlib.util
import platform
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

ComputePath = Literal["fused", "sorted_torch"]
ALIGNMENT = 32
"""H and N must be multiples of this for the op's tiles."""

_op_lock = threading.Lock()
"""The op has one scratch pad for the whole process: two threads in it at once overwrite each other's rows."""


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
    """Weights of one layer's slots in the order that `path` wants: w13 [E, 2N, H] (gate, then up), w2 [E, H, N]."""

    w13: torch.Tensor
    w2: torch.Tensor
    path: ComputePath
    scratch: Scratch = field(repr=False)


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


def supports(dtype: torch.dtype, hidden_size: int, moe_intermediate_size: int) -> tuple[bool, str]:
    """Whether the fused path can be taken, and why (not)."""
    if dtype != torch.bfloat16:
        return False, f"vLLM's CPU op is used for bf16 weights, these are {dtype}"
    if hidden_size % ALIGNMENT or moe_intermediate_size % ALIGNMENT:
        return False, f"hidden {hidden_size} and intermediate {moe_intermediate_size} are not multiples of {ALIGNMENT}"
    reason = _load_op()
    return not reason, reason or f"vLLM's C++ op cpu_fused_moe ({_isa()})"


def pack(w13: torch.Tensor, w2: torch.Tensor, path: ComputePath, scratch: Scratch | None = None) -> PackedExperts:
    """Reorders w13 [E, 2N, H] and w2 [E, H, N] in place, slot by slot: no second copy of a layer is ever held."""
    if path == "fused":
        for weights in (w13, w2):
            packed = torch.empty_like(weights[:1])
            for slot in weights.split(1):
                torch.ops._C.prepack_moe_weight(slot, packed, _isa())
                slot.copy_(packed)
    return PackedExperts(w13, w2, path, scratch or Scratch())


def moe(experts: PackedExperts, jobs: Sequence[Job]) -> None:
    """Fills `out` of every job. Jobs of several requests share one pass over the weights; the bits do not depend on
    which jobs come together."""
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
    with _op_lock:
        torch.ops._C.cpu_fused_moe(
            out, x, experts.w13, experts.w2, None, None, weights, slot_ids, False, "silu", _isa()
        )


@lru_cache(maxsize=1)
def _isa() -> str:
    """As vLLM's CPU experts choose it."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    return {"aarch64": "neon", "arm64": "neon", "ppc64le": "vsx"}.get(machine, "vec")


def _library_name() -> str:
    """The one library that vLLM's CpuPlatform.import_kernels loads on this processor: two would clash."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "_C"
    if not torch.cpu._is_avx512_supported():
        return "_C_AVX2"
    return "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"


@lru_cache(maxsize=1)
def _load_op() -> str:
    """Registers the op unless vLLM has done so already. Returns what is in the way, "" if nothing is."""
    if _has_op():
        return ""
    if torch.version.cuda or torch.version.hip:
        return "vLLM's CPU op comes with its CPU build only, and this torch is a GPU build"
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return "vLLM is not installed"
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob(f"{_library_name()}.*so"))
    if not files:
        return f"{folder} holds no {_library_name()}.*so"
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        return f"{files[0]} does not load: {error}"
    return "" if _has_op() else f"{files[0]} has no cpu_fused_moe"


def _has_op() -> bool:
    return hasattr(torch.ops._C, "cpu_fused_moe") and hasattr(torch.ops._C, "prepack_moe_weight")

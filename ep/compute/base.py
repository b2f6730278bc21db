"""What a shard asks of the code that computes its experts.

Shape legend: T tokens, H hidden, P pairs (token, slot); ep/wire.py has the order of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ep.checkpoint import SlotWeights

if TYPE_CHECKING:
    from ep.kernels.p2p import Job


@dataclass(frozen=True)
class Work:
    """One request's part of a layer, checked, in host memory.

    rows [T, H] bf16 or float32, or e4m3fn with scales float32 [T, ceil(H / 128)]; counts int32 [T], all at least 1;
    slot_ids int32 [P] and weights float32 [P]; out [T, H] float32 or bf16: the partials are written there.
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    counts: npt.NDArray[np.int32]
    slot_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    out: torch.Tensor


class JobCompute(Protocol):
    """The experts of an ipc server's jobs: rows of the job -> out [C, H], the partials. On a GPU it only launches and
    may be captured."""

    def __call__(self, job: Job, capacity: int, out: torch.Tensor) -> None: ...


class ExpertCompute(Protocol):
    """The slots of every MoE layer of a shard and the code that runs them. `run` is for one thread.

    Made empty, by which it is known to be able to compute the model; `add_slots` for every slot, layer after layer,
    then `finish`, then any number of `run`.
    """

    @property
    def path(self) -> str:
        """The chosen way to compute, in a word."""
        ...

    @property
    def reason(self) -> str:
        """Why that one."""
        ...

    @property
    def slot_bytes(self) -> int:
        """Memory of the slots, over all layers."""
        ...

    @property
    def slot_format(self) -> str:
        """Equal wherever the bytes of a slot mean the same weights."""
        ...

    def slot_parts(self, layer_pos: int, slot_idx: int) -> list[torch.Tensor]:
        """The memory of one slot (ep/compute/slot_memory.py). May be read, and written where no request goes to the
        slot, by any thread while another runs `run`."""
        ...

    def load_slot(self, layer_pos: int, slot_idx: int, weights: SlotWeights) -> None:
        """Overwrites one slot with weights of one slot, under the same rule."""
        ...

    def add_slots(self, weights: SlotWeights) -> None:
        """The next slots of a layer; on a CPU all of its slots. Their memory may be kept and reordered in place."""
        ...

    def finish(self) -> None:
        """Everything that must not happen while a router waits."""
        ...

    def run(self, layer_pos: int, works: Sequence[Work]) -> None:
        """Fills `out` of every work before it returns; the works share passes over the weights."""
        ...

    def for_jobs(self, job_tokens: int, num_shards: int, is_hosted: bool = False) -> JobCompute:
        """The same slots for jobs of up to job_tokens rows, beside any other user of them. num_shards: that the experts
        are split over. is_hosted: a router of this process waits on the same device meanwhile."""
        ...

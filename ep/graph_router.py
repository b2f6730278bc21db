"""The router's half of a MoE layer on a GPU: kernels only, so that a decode step is one captured graph.

    topk_ids ─> logical expert -> slot ─> experts of this process's slots ─> routed sum

No host work per layer: shapes are static, the number of real tokens and the placement are read on the device. What a
graph has captured stays valid when the placement changes, because its table is overwritten in place.

Shape legend: T tokens (padding included), H hidden, K top-k, L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from ep.assign import Assigner
from ep.errors import PlacementError
from ep.link_stats import LinkStats
from ep.model import ModelSpec
from ep.placement import Placement
from ep.recovery import Recovery, StepFailure
from ep.share import WHOLE

if TYPE_CHECKING:
    from ep.compute.base import ExpertCompute
    from ep.compute.gpu import GpuCompute
    from ep.recorder import LoadRecorder


class GraphRouter:
    """Runs the routed experts of any MoE layer on slots in this process's GPU. For one thread.

    open_slots: loads all slots onto the device. It is called when vLLM loads its own weights, so that its memory
    accounting sees the slots too. max_tokens: the largest batch.
    """

    share = WHOLE

    def __init__(
        self,
        spec: ModelSpec,
        placement: Placement,
        open_slots: Callable[[], ExpertCompute],
        max_tokens: int,
        device: torch.device,
    ) -> None:
        if placement.num_shards != 1:
            raise PlacementError(f"placement has {placement.num_shards} shards, expected 1 in the router's process")
        self.spec = spec
        self.recorder: LoadRecorder | None = None
        self.recoveries: list[Recovery] = []
        self._open_slots = open_slots
        self._max_tokens = max_tokens
        self._compute: GpuCompute | None = None
        self._stats = [LinkStats()]
        self._slot_of = torch.empty(spec.num_moe_layers, spec.num_experts, dtype=torch.int32, device=device)
        self._num_tokens = torch.full((1,), max_tokens, dtype=torch.int32, device=device)
        self._routed: torch.Tensor | None = None
        self.set_placement(placement)

    def open_slots(self) -> None:
        """Load the experts of this process."""
        self._compute = cast("GpuCompute", self._open_slots())

    def set_placement(self, placement: Placement, assigner: Assigner | None = None) -> None:
        """Between steps only."""
        slot_of = np.zeros((placement.num_moe_layers, self.spec.num_experts), dtype=np.int32)
        for layer, slots in enumerate(placement.slots[:, 0]):
            filled = np.flatnonzero(slots >= 0)
            slot_of[layer, slots[filled]] = filled
        self._slot_of.copy_(torch.from_numpy(slot_of))
        self.placement = placement

    @contextmanager
    def step(self, num_tokens: int, num_requests: int, num_decode: int | None = None) -> Iterator[int]:
        """Rows past num_tokens are padding."""
        self._num_tokens.fill_(num_tokens)
        yield 0

    def failure(self, step: int) -> StepFailure | None:
        """None: there is nothing to lose here."""
        return None

    def take_load(self) -> None:
        """Load is not counted here."""

    def dispatch(
        self, layer_pos: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> None:
        """hidden [T, H] bf16, topk_ids int32 [T, K], topk_weights float32 [T, K]."""
        assert self._compute is not None, "open_slots comes before dispatch"
        slots = self._slot_of[layer_pos][topk_ids]
        num_tokens = self._num_tokens.clamp(max=len(hidden))
        self._routed = self._compute.partials(layer_pos, hidden, slots, topk_weights, num_tokens)

    def combine(self, layer_pos: int) -> torch.Tensor:
        """The routed sum [T, H] of the last dispatch."""
        routed, self._routed = self._routed, None
        assert routed is not None, "combine follows dispatch"
        return routed

    def stats(self) -> list[LinkStats]:
        return self._stats

    def close(self) -> None:
        """Nothing to hang up on."""

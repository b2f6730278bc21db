"""The router's half of a MoE layer on a GPU: kernels only, so that a decode step is one captured graph.

    topk_ids ─> logical expert -> slot ─> experts of this process's slots ─> routed sum

No host work per layer: shapes are static, the number of real tokens and the placement are read on the device. What a
graph has captured stays valid when the placement changes, because its table is overwritten in place. What the tokens
choose is counted on the device too, and taken from there now and then (`take_load`).

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
from ep.ipc_setup import open_device
from ep.link_stats import LinkStats
from ep.model import ModelSpec
from ep.placement import Placement
from ep.recovery import Recovery, StepFailure
from ep.share import ALL_ROWS, WHOLE
from ep.under_way import StepsUnderWay, UnderWay, decode_tokens

if TYPE_CHECKING:
    from ep.compute.base import ExpertCompute
    from ep.compute.gpu import GpuCompute
    from ep.recorder import LoadRecorder


class GraphRouter:
    """Runs the routed experts of any MoE layer on slots in this process's GPU. Steps, dispatch and combine are for one
    thread.

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
        self._device = open_device(device)
        self._stats = [LinkStats()]
        size = (spec.num_moe_layers, spec.num_experts)
        self._slot_of = torch.empty(size, dtype=torch.int32, device=device)
        self._sizes = torch.tensor([max_tokens, 0], dtype=torch.int32, device=device)
        self._load = torch.zeros(2, *size, dtype=torch.int64, device=device)
        self._steps, self._num_dispatched = StepsUnderWay(), 0
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
        """What is dispatched inside belongs to one step, whose number is given: rows past num_tokens are padding.

        num_decode: how many of the first rows are decode tokens; None: all if there is a token per request, else none.
        """
        if not self._steps.newest:
            self._load.zero_()  # of what vLLM warmed up with
        num_decode = decode_tokens(num_tokens, num_requests, num_decode)
        for place, value in enumerate((num_tokens, num_decode)):
            self._sizes[place : place + 1].fill_(value)
        if num_tokens:
            self._num_dispatched += self.spec.num_moe_layers
        yield self._steps.begin(UnderWay(num_tokens, num_decode, self.placement.generation, ALL_ROWS))

    def failure(self, step: int) -> StepFailure | None:
        """When the device is done with this step, from any thread, once each step: None, there is nothing to lose."""
        ended = self._steps.end(step)
        if ended is not None and self.recorder is not None:
            ended.record(self.recorder, self._stats)
        return None

    def take_load(self) -> None:
        """Adds what was counted on the device since the last time to `stats` and to the recorder; between steps, from
        any thread. Nothing before the first step: the device may be capturing graphs then."""
        if not self._steps.newest:
            return
        self._device.drain()
        pairs = self._load.cpu().numpy().copy()
        self._load.zero_()
        self._device.drain()
        (link,) = self._stats
        link.pairs += int(pairs.sum())
        link.tokens = link.pairs // self.spec.top_k
        link.requests = self._num_dispatched
        if self.recorder is not None:
            self.recorder.add_counts(pairs, self._stats)

    def dispatch(
        self, layer_pos: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> None:
        """hidden [T, H] bf16, topk_ids int [T, K], topk_weights float32 [T, K]; launches only."""
        from ep.kernels.slots import assign_slots  # needs Triton

        assert self._compute is not None, "open_slots comes before dispatch"
        assigned = assign_slots(topk_ids.int(), self._slot_of, self._sizes, self._load, layer_pos)
        self._routed = self._compute.partials(layer_pos, hidden, assigned.slots, topk_weights, assigned.num_tokens)

    def combine(self, layer_pos: int) -> torch.Tensor:
        """The routed sum [T, H] of the last dispatch."""
        routed, self._routed = self._routed, None
        assert routed is not None, "combine follows dispatch"
        return routed

    def stats(self) -> list[LinkStats]:
        return self._stats

    def close(self) -> None:
        """Nothing to hang up on."""

"""A router that reaches the shards of its node over ipc: it only launches, so a step may be one captured graph.

    step ─> (dispatch ─> combine, once per MoE layer) ─> failure

Shards of other nodes, if there are any, are asked over sockets in between (ep/far_shards.py), by the host.

Outside of steps, as when vLLM warms up, nothing is sent and nobody is waited for: all rows are padding. A GPU may load
what it has not run before only when it is idle, and a shard may need this process to answer.

What goes wrong in a step ends its waits and is found when the device is done with it (`failure`); it is mended before
the next one. Tokens, pairs and messages are counted on the device and taken from there now and then (`take_load`).

Shape legend: T tokens of a call (padding included), H hidden, K top-k, S shards, L MoE layers, E logical experts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ep.errors import DeadlineError, ShardLostError, TransportError
from ep.far_shards import FarShards
from ep.link_stats import LinkStats
from ep.model import ModelSpec
from ep.placement import Placement
from ep.planning.plan import shard_load
from ep.recovery import Recovery, StepFailure
from ep.share import WHOLE, Share
from ep.transport.ipc import IpcTransport
from ep.transport.ipc_device import IpcDevice
from ep.under_way import StepsUnderWay, UnderWay, decode_tokens

if TYPE_CHECKING:
    from ep.assign import Assigner
    from ep.recorder import LoadRecorder

log = logging.getLogger(__name__)
MAX_EPISODES = 16
MAX_FAILED_IN_ROW = 6
"""Steps that fail one after the other before their requests are not tried again."""

Replace = Callable[[int, TransportError], None]
"""Called with a shard that was lost and why. Blocks until the transport reaches its successor, or raises
TransportError."""


@dataclass(frozen=True)
class _Episode:
    """Steps first to last were not whole. is_lasting: and what failed is not mended."""

    first: int
    last: int
    error: TransportError
    is_lasting: bool = False


@dataclass(frozen=True)
class _Call:
    """What was last dispatched: this router's rows. first: which token of the step the first one is; length: rows that
    combine is to return."""

    layer_pos: int
    hidden: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    first: int
    length: int


class IpcRouter:
    """Runs the routed experts of any MoE layer. Steps, dispatch and combine are for one thread.

    open_slots: called once vLLM loads its weights, so that its memory accounting sees slots in this process too; loads
    those, if there are any, attaches the transport to all shards of the node and returns what asks those of others,
    None where there are none. replace: None makes the loss of a shard an error of every step from then on. share: this
    router's part of every batch.
    """

    def __init__(
        self,
        spec: ModelSpec,
        placement: Placement,
        transport: IpcTransport,
        device: IpcDevice,
        open_slots: Callable[[], FarShards | None],
        replace: Replace | None = None,
        share: Share = WHOLE,
    ) -> None:
        self.spec = spec
        self.share = share
        self.placement = placement
        self.recorder: LoadRecorder | None = None
        self.recoveries: list[Recovery] = []
        self._transport, self._device = transport, device
        self._open_slots, self._replace = open_slots, replace
        self._far: FarShards | None = None
        self._stats = [LinkStats() for _ in range(transport.num_shards)]
        self._call: _Call | None = None
        self._steps = StepsUnderWay()
        self._now: UnderWay | None = None
        self._episodes: deque[_Episode] = deque(maxlen=MAX_EPISODES)
        self._lost: dict[int, TransportError] = {}
        self._failed_in_row = 0
        self._lock = threading.Lock()
        transport.begin_step(0, 0)

    def open_slots(self) -> None:
        """Load the slots of this process, if there are any, and meet the shards."""
        self._far = far = self._open_slots()
        self._transport.warm_up(torch.bfloat16 if far is None else torch.float32)
        if far is not None:
            far.router.recoveries = self.recoveries
            for shard_idx in far.shards:
                self._stats[shard_idx] = far.router.stats()[shard_idx]

    def set_placement(self, placement: Placement, assigner: Assigner | None = None) -> None:
        """Between steps only, from any thread; waits for those that are under way. Raises PlacementError."""
        self._device.drain()
        self.take_load()
        self._transport.set_placement(placement)
        if self._far is not None:
            self._far.set_placement(placement, assigner)
        self._device.drain()
        self.placement = placement

    @contextmanager
    def step(self, num_tokens: int, num_requests: int, num_decode: int | None = None) -> Iterator[int]:
        """What is dispatched inside belongs to one step, whose number is given: rows past num_tokens are padding.

        num_decode: how many of the first rows are decode tokens; None: all if there is a token per request, else none.
        Mends first what the steps before have met. Raises the TransportError of a shard that does not come back; with a
        share of the batch the step goes on, to have that as its `failure`.
        """
        error = self._mend()
        if error is not None and self.share.size == 1:
            raise error
        num_decode = decode_tokens(num_tokens, num_requests, num_decode)
        # A captured step does not say which rows of its batch are this router's: its padding counts as none.
        now = UnderWay(num_tokens, num_decode, self.placement.generation, self.share.rows(num_tokens))
        step = self._steps.begin(now)
        if error is not None:  # the others are in the step already, and wait in its collectives
            with self._lock:
                self._episodes.append(_Episode(step, step, error, is_lasting=True))
        rows = self.share.rows(num_tokens)
        self._transport.begin_step(num_tokens, num_decode, step, rows.stop - rows.start)
        self._now = now
        try:
            yield step
        finally:
            self._now = None
            far = self._far
            if far is not None and (failure := far.take_failure()) is not None:
                with self._lock:
                    self._episodes.append(_Episode(step, step, failure, is_lasting=True))

    def failure(self, step: int) -> StepFailure | None:
        """When the device is done with this step: what kept it from being whole. From any thread, once each step."""
        ended = self._steps.end(step)
        with self._lock:
            found = self._episode(step)
            self._failed_in_row = self._failed_in_row + 1 if found is not None else 0
            may_try = self._failed_in_row <= MAX_FAILED_IN_ROW
        if found is not None:
            is_mended = isinstance(found.error, (ShardLostError, DeadlineError)) and self._replace is not None
            return StepFailure(found.error, is_mended and not found.is_lasting and may_try)
        if ended is not None and self.recorder is not None:
            ended.record(self.recorder, self._stats)
        return None

    def dispatch(
        self, layer_pos: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> None:
        """Sends this router's rows of hidden [T, H] to the shards of topk_ids int [T, K], with topk_weights float32
        [T, K]; launches only."""
        rows = self.share.rows(len(hidden))
        if self._now is not None:
            self._now.rows = rows
        self._begin(
            _Call(
                layer_pos, hidden[rows], topk_ids[rows].int(), topk_weights[rows].float(), rows.start,
                self.share.length(len(hidden)),
            )
        )  # fmt: skip

    def combine(self, layer_pos: int) -> torch.Tensor:
        """The routed sum of this router's rows, bf16, padded to the longest share; launches only. Rows that are padding
        mean nothing, and neither does any row of a step with a `failure`."""
        call = self._call
        assert call is not None and call.layer_pos == layer_pos, "combine follows the dispatch of the same layer"
        parts = [self._sum()]
        most = self._transport.message.max_tokens
        for start in range(most, len(call.hidden), most):
            self._begin(
                _Call(
                    layer_pos, call.hidden[start:], call.topk_ids[start:], call.topk_weights[start:],
                    call.first + start, 0,
                )
            )  # fmt: skip
            parts.append(self._sum())
        self._call = None
        if missing := call.length - len(call.hidden):
            parts.append(call.hidden.new_zeros(missing, call.hidden.shape[1]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _begin(self, call: _Call) -> None:
        """As many of its rows as one message takes."""
        most = self._transport.message.max_tokens
        self._call = call
        hidden, weights = call.hidden[:most], call.topk_weights[:most]
        self._transport.dispatch(call.layer_pos, hidden, call.topk_ids[:most], weights, call.first)
        if self._far is not None:
            self._far.dispatch(call.layer_pos, hidden, self._transport.slots, weights)

    def _sum(self) -> torch.Tensor:
        """Of the rows that went out last."""
        far, call = self._far, self._call
        if far is None or call is None:
            return self._transport.combine()
        most = self._transport.message.max_tokens
        elsewhere = far.combine(call.layer_pos, call.hidden[:most])
        return (self._transport.combine(torch.float32) + elsewhere).bfloat16()

    def take_load(self) -> None:
        """Adds what was counted on the device since the last time to `stats` and to the recorder; between steps, from
        any thread. Nothing before the first step: the device may be capturing graphs then."""
        if not self._steps.newest:
            return
        self._device.drain()
        carried = self._transport.take_carried()
        self._device.drain()
        pairs = shard_load(self.placement, carried.pairs.sum(0)).sum(0)
        far = self._far.shards if self._far is not None else ()
        for shard_idx, (link, num_pairs, rows, messages) in enumerate(
            zip(self._stats, pairs.round().tolist(), carried.rows.tolist(), carried.messages.tolist(), strict=True)
        ):
            if shard_idx in far:  # its own router counts it
                continue
            link.pairs += int(num_pairs)
            link.tokens += rows
            link.requests += messages
            link.bytes_out += rows * self._transport.message.row_bytes
            link.bytes_in += rows * self._transport.message.partial_row_bytes
        if self.recorder is not None:
            self.recorder.add_counts(carried.pairs, self._stats)

    def stats(self) -> list[LinkStats]:
        """By shard, as of the last `take_load`. Round trips are not timed: no host takes part in them."""
        return self._stats

    def close(self) -> None:
        self._transport.close()
        if self._far is not None:
            self._far.close()

    def _episode(self, step: int) -> _Episode | None:
        """In which this step failed."""
        known = [one for one in self._episodes if one.first <= step <= one.last]
        first = self._transport.failed_step
        if 0 < first <= step:
            known.append(_Episode(first, step, self._transport.failure()))
        return max(known, key=lambda one: one.is_lasting, default=None)

    def _mend(self) -> TransportError | None:
        """What could not be mended."""
        transport = self._transport
        if not (transport.is_disturbed or self._lost or transport.lost_shards()):
            return None
        self._device.synchronize()  # the waits of steps under way end at once, or soon by the watchdog
        self._lost = {**transport.lost_shards(), **self._lost}
        with self._lock:
            if first := transport.failed_step:
                self._episodes.append(_Episode(first, self._steps.newest, transport.failure()))
            transport.reset()
        for shard_idx, error in list(self._lost.items()):
            start = time.monotonic()
            try:
                if self._replace is None:
                    raise error
                self._replace(shard_idx, error)
            except TransportError as lasting:
                # Nothing is to wait for it meanwhile.
                transport.abort(shard_idx, error.reason)
                return lasting
            del self._lost[shard_idx]
            self.recoveries.append(Recovery(shard_idx, None, time.monotonic() - start, str(error)))
            log.info("shard %d: back after %.1f s", shard_idx, time.monotonic() - start)
        return None

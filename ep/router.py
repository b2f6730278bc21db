"""The router's half of a MoE layer: assign, dispatch, wait, combine. No Ray in it.

Shape legend: T tokens, H hidden, K top-k, P pairs (token, slot) on one shard; ep/wire.py has the order of pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from ep.assign import Assigner, IntArray, ShardWork, split
from ep.errors import DeadlineError, OptionError, PlacementError, ShardLostError, TransportError
from ep.kernels.reference import quantize_tokens
from ep.link_stats import LinkStats
from ep.model import ModelSpec
from ep.placement import Placement
from ep.profile_marks import mark_experts
from ep.recovery import Recovery, StepFailure
from ep.share import ALL_ROWS, WHOLE
from ep.transport.base import Endpoint, Partial, Transport
from ep.transport.buffer import TORCH_DTYPES, RawRows, to_raw
from ep.wire import Dispatch

if TYPE_CHECKING:
    from ep.recorder import LoadRecorder

COMBINE_DTYPES = ("bf16", "f32")
OnShardLost = Callable[[int, TransportError], Endpoint]
"""Called with a shard and what happened to it. Blocks until the shard is back and returns its endpoint, or raises."""

MAX_RECOVERIES = 3
"""Times that one shard may be lost within one layer before the error is the caller's."""


@dataclass
class _Sent:
    """Work that a shard has been asked for. error is set if it could not be."""

    work: ShardWork
    sent_at: float
    error: ShardLostError | DeadlineError | None = None
    losses: int = 0


@dataclass
class _Call:
    """One layer between dispatch and combine: what is out, what is back, and what it takes to send work again.

    rows [T, H] (raw) and scales [T, ceil(H / 128)] are as they travel. rest: tokens beyond what fits in one dispatch.
    """

    layer_pos: int
    rows: RawRows
    scales: npt.NDArray[np.float32] | None
    slots: IntArray
    weights: npt.NDArray[np.float32]
    works: list[ShardWork]
    rest: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    dtype: torch.dtype
    device: torch.device
    sent: dict[int, _Sent] = field(default_factory=dict)
    partials: dict[int, torch.Tensor] = field(default_factory=dict)


class Router:
    """Runs the routed experts of any MoE layer on the shards of a placement. For one thread at a time.

    dispatch_dtype: how rows travel to the shards (bf16, f32, fp8). combine_dtype: how partials come back (bf16, f32).
    deadline_s: how long a shard may take for one layer. on_shard_lost: None makes the loss of a shard an error of the
    call. layer_pos counts MoE layers, as a placement does (`ModelSpec.layer_pos`).
    """

    share = WHOLE

    def __init__(
        self,
        spec: ModelSpec,
        placement: Placement,
        transport: Transport,
        dispatch_dtype: str = "bf16",
        combine_dtype: str = "f32",
        deadline_s: float = 30.0,
        on_shard_lost: OnShardLost | None = None,
    ) -> None:
        if dispatch_dtype not in TORCH_DTYPES:
            raise OptionError(f"dispatch dtype is {dispatch_dtype}, expected one of {', '.join(TORCH_DTYPES)}")
        if combine_dtype not in COMBINE_DTYPES:
            raise OptionError(f"combine dtype is {combine_dtype}, expected one of {', '.join(COMBINE_DTYPES)}")
        self.spec = spec
        self.dispatch_dtype = dispatch_dtype
        self.combine_dtype = combine_dtype
        self.deadline_s = deadline_s
        self.recorder: LoadRecorder | None = None
        self.recoveries: list[Recovery] = []
        self._transport = transport
        self._on_shard_lost = on_shard_lost
        self._seq = 0
        self._call: _Call | None = None
        self._gone: dict[int, ShardLostError | DeadlineError] = {}
        self._stats = [LinkStats() for _ in range(transport.num_shards)]
        self.set_placement(placement)

    def open_slots(self) -> None:
        """None here: every slot is a shard's."""

    def set_placement(self, placement: Placement, assigner: Assigner | None = None) -> None:
        """Between steps only. assigner: of this placement, where it was made beforehand.

        Raises PlacementError if it is not for these shards.
        """
        if (placement.num_shards, placement.num_moe_layers) != (self._transport.num_shards, self.spec.num_moe_layers):
            raise PlacementError(
                f"placement is for {placement.num_shards} shards and {placement.num_moe_layers} MoE layers, "
                f"expected {self._transport.num_shards} and {self.spec.num_moe_layers}"
            )
        self.placement = placement
        self._assigner = assigner or Assigner(placement)

    @contextmanager
    def step(self, num_tokens: int, num_requests: int, num_decode: int | None = None) -> Iterator[int]:
        """All that is dispatched inside is one step to the recorder, of num_tokens tokens of num_requests requests.

        A step that fails is not recorded: not all of its layers ran. num_decode is left to the recorder's own look.
        """
        recorder = self.recorder
        if recorder is None:
            yield 0
            return
        recorder.begin_step(self._stats, num_tokens, num_requests)
        try:
            yield 0
        except BaseException:
            recorder.drop_step()
            raise
        recorder.end_step(self._stats, self.placement.generation)

    def moe(
        self,
        layer_pos: int,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        overlap: Callable[[], torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """`dispatch`, then `overlap` while the shards compute, then `combine`.

        What overlap returns [T, H], unless None, is added to the rounded sum, as vLLM adds its shared experts.
        """
        self.dispatch(layer_pos, hidden, topk_ids, topk_weights)
        extra = overlap() if overlap is not None else None
        routed = self.combine(layer_pos)
        return routed if extra is None else routed + extra

    def dispatch(
        self,
        layer_pos: int,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        rows: slice = ALL_ROWS,
    ) -> None:
        """Sends hidden [T, H] to the shards of logical experts topk_ids int [T, K] with topk_weights float32 [T, K].

        rows: those of the T that are this router's; the others are another's. Never waits for a shard's compute. A
        shard that cannot be reached is `combine`'s concern.
        """
        topk_ids = topk_ids.cpu()
        self._dispatch(layer_pos, hidden[rows], topk_ids[rows], topk_weights[rows])
        if self.recorder is not None:  # counted while the shards compute
            self.recorder.note(layer_pos, topk_ids.numpy(), rows)

    def dispatch_placed(
        self, layer_pos: int, hidden: torch.Tensor, shards: IntArray, slots: IntArray, topk_weights: torch.Tensor
    ) -> None:
        """As `dispatch`, of tokens in host memory whose slots somebody has chosen: shards and slots int32 [T, K], shard
        -1 for what is none of this router's. At most as many as the transport takes; `combine` gives float32."""
        self._send_all(layer_pos, hidden, shards, slots, topk_weights, None, torch.float32, hidden.device)

    def _dispatch(
        self, layer_pos: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> None:
        """As many tokens as go out at once; `combine` sends the rest."""
        most = self._transport.max_tokens
        rest = (hidden[most:], topk_ids[most:], topk_weights[most:]) if len(hidden) > most else None
        dtype, device = hidden.dtype, hidden.device
        if rest is not None or device.type != "cpu":
            hidden, topk_ids, topk_weights = (t[:most].cpu() for t in (hidden, topk_ids, topk_weights))
        shards, slots = self._assigner.place(layer_pos, topk_ids.numpy())
        self._send_all(layer_pos, hidden, shards, slots, topk_weights, rest, dtype, device)

    def _send_all(
        self, layer_pos: int, hidden: torch.Tensor, shards: IntArray, slots: IntArray, topk_weights: torch.Tensor,
        rest: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None, dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        """dtype, device: of what `combine` returns."""
        if self._call is not None:  # its caller failed in between
            self._transport.abandon()
        works = split(shards, self._transport.num_shards)
        scales = None
        rows = hidden
        if self.dispatch_dtype == "fp8":
            quantized = quantize_tokens(hidden)
            rows, scales = quantized.q, quantized.scale_inv.numpy()
        weights = topk_weights.float().numpy().ravel()
        call = self._call = _Call(
            layer_pos, to_raw(rows, self.dispatch_dtype), scales, slots.ravel(), weights, works, rest, dtype, device
        )
        self._seq += 1
        for shard_idx, work in enumerate(works):
            if len(work.counts):
                sent = call.sent[shard_idx] = _Sent(work, time.perf_counter(), self._gone.get(shard_idx))
                if sent.error is not None:
                    continue
                try:
                    self._send(call, shard_idx, work)
                except (ShardLostError, DeadlineError) as error:
                    sent.error = error
                    if self._on_shard_lost is not None:  # it knows better than another attempt to connect would tell
                        self._gone[shard_idx] = error

    def combine(self, layer_pos: int) -> torch.Tensor:
        """The routed sum [T, H] of the rows last dispatched, in their dtype: partials summed in float32, rounded once.

        Raises ShardLostError, ShardFailedError or DeadlineError; never returns with a partial missing.
        """
        call = self._call
        assert call is not None and call.layer_pos == layer_pos, "combine follows the dispatch of the same layer"
        try:
            self._collect(call)
        except BaseException:
            self._transport.abandon()
            raise
        finally:
            self._call = None
        routed = torch.from_numpy(self._sum(call)).to(call.dtype)
        if call.device.type != "cpu":
            routed = routed.to(call.device)
        if call.rest is None:
            return routed
        self._dispatch(layer_pos, *call.rest)
        return torch.cat([routed, self.combine(layer_pos)])

    def failure(self, step: int) -> StepFailure | None:
        """None: what fails here raises at once."""
        return None

    def take_load(self) -> None:
        """Nothing is counted elsewhere."""

    def stats(self) -> list[LinkStats]:
        """By shard, since the router was made."""
        return self._stats

    def describe(self, shard_idx: int) -> str:
        """How this shard is reached, in words."""
        return self._transport.describe(shard_idx)

    def close(self) -> None:
        self._transport.close()

    def _send(self, call: _Call, shard_idx: int, work: ShardWork) -> None:
        message = Dispatch(
            self._seq,
            self.placement.generation,
            call.layer_pos,
            self.dispatch_dtype,
            self.combine_dtype,
            len(work.counts),
            len(work.pair_idx),
        )
        views = self._transport.prepare(shard_idx, message, time.monotonic() + self.deadline_s)
        views.counts[:] = work.counts
        call.slots.take(work.pair_idx, out=views.slot_ids, mode="clip")
        call.weights.take(work.pair_idx, out=views.weights, mode="clip")
        call.rows.take(work.token_idx, axis=0, out=views.rows, mode="clip")
        if call.scales is not None and views.scales is not None:
            call.scales.take(work.token_idx, axis=0, out=views.scales, mode="clip")
        self._stats[shard_idx].bytes_out += self._transport.dispatch(shard_idx)

    def _collect(self, call: _Call) -> None:
        """Waits until every partial is there, asking again for what is lost."""
        for shard_idx, sent in call.sent.items():
            if sent.error is not None:
                self._recover(call, shard_idx, sent.error)
        deadline, since, computed_ns = time.monotonic() + self.deadline_s, time.perf_counter_ns(), 0
        while len(call.partials) < len(call.sent):
            try:
                partial = self._transport.receive(deadline)
            except (ShardLostError, DeadlineError) as error:
                self._recover(call, error.shard_idx, error)
                deadline = time.monotonic() + self.deadline_s
                continue
            call.partials[partial.shard_idx] = partial.rows
            computed_ns = partial.compute_ns
            self._count(call.sent[partial.shard_idx], partial)
        mark_experts(min(computed_ns, time.perf_counter_ns() - since))

    def _recover(self, call: _Call, shard_idx: int, error: ShardLostError | DeadlineError) -> None:
        """Blocks until the shard is back, then sends its work again. Raises the error if it does not come back."""
        start, sent = time.monotonic(), call.sent[shard_idx]
        reason = str(error)
        while True:
            sent.losses += 1
            if self._on_shard_lost is None or sent.losses > MAX_RECOVERIES:
                raise error
            self._gone[shard_idx] = error
            endpoint = self._on_shard_lost(shard_idx, error)
            try:
                self._transport.replace(shard_idx, endpoint)
                self._send(call, shard_idx, sent.work)
            except (ShardLostError, DeadlineError) as again:
                error = again
                continue
            del self._gone[shard_idx]
            self.recoveries.append(Recovery(shard_idx, call.layer_pos, time.monotonic() - start, reason))
            return

    def _sum(self, call: _Call) -> npt.NDArray[np.float32]:
        """The partials' sum [T, H], in the order of the shards whichever came first: the same bits every time."""
        num_tokens, total = len(call.rows), None
        for shard_idx in sorted(call.partials):
            rows, work = call.partials[shard_idx].float().numpy(), call.works[shard_idx]
            if total is None:
                total = np.zeros((num_tokens, rows.shape[1]), dtype=np.float32)
            if len(rows) == num_tokens:
                total += rows
            else:
                total[work.token_idx] += rows
        return np.zeros(call.rows.shape, dtype=np.float32) if total is None else total

    def _count(self, done: _Sent, partial: Partial) -> None:
        stats = self._stats[partial.shard_idx]
        round_trip_us = (time.perf_counter() - done.sent_at) * 1e6
        work = done.work
        stats.count(len(work.token_idx), len(work.pair_idx), partial.num_bytes, partial.compute_ns, round_trip_us)

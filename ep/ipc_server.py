"""The shard's side of the data plane between GPUs of one node: a thread that keeps jobs ahead of the messages.

    steps and headers of all routers ─> poll ─> Demand ─> captured graph of a size: take ─> collect ─> experts ─> return

Graphs know no layer and no router: the device has both from the messages that it finds when a graph's turn comes.
While messages come, graphs are launched ahead of them and wait there, so that no host has a part in a layer; after a
pause the host looks for the next message. Messages that are not to be answered it refuses.

Shape legend: C rows of a job (capacity), H hidden.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ep.compute.base import JobCompute
from ep.errors import OptionError, TransportError
from ep.handover import Handover
from ep.ipc_jobs import Demand, IpcLimits
from ep.ipc_launcher import JobLauncher, JobOperands
from ep.ipc_stats import DeviceCounts, IpcStats
from ep.kernels import p2p
from ep.kernels import p2p_layout as layout
from ep.kernels.p2p import Desk, Job
from ep.kernels.p2p_layout import Header, MessageShape
from ep.kernels.shared_memory import Mapped
from ep.transport import mailbox
from ep.transport.ipc_device import IpcDevice
from ep.transport.ipc_handles import RouterHandles, ShardHandles
from ep.transport.mailbox import MailboxBlock

log = logging.getLogger(__name__)
_MASK = 0xFFFFFFFF
ADD_EVERY = 1 << 16
"""Launches, whose rows are fewer than 2^32."""


@dataclass
class _Peer:
    """A router. place, begun_place: in the block, of its header and of the step that it has begun; seen, begun: what
    was there when it was looked at. rows: of its newest message, 0 once it was told that the answer is launched, which
    is so when there is a job for them behind newest_begun: an earlier one may not find it."""

    router_idx: int
    inbox: torch.Tensor
    box: Mapped
    place: int
    begun_place: int
    seen: int
    begun: int
    rows: int = 0
    newest_begun: int = 0


class IpcServer:
    """Serves any number of routers, up to the block's. message: what every router must send.

    num_layers: MoE layers; generations: which placements are served, MAX_SERVED at most; after a change `refresh` is to
    be called. on_failure: called by the serving thread when it ends by an error, which `error` then is.
    """

    def __init__(
        self,
        device: IpcDevice,
        block: MailboxBlock,
        shard_idx: int,
        message: MessageShape,
        num_layers: int,
        compute: JobCompute,
        generations: Callable[[], Collection[int]],
        limits: IpcLimits | None = None,
        on_failure: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        supported, reason = p2p.supports(message, block.num_shards, num_layers)
        if not supported:
            raise OptionError(f"ipc: {reason}")
        self.error: Exception | None = None
        self._device, self._block, self._shard_idx = device, block, shard_idx
        self._message, self._num_layers = message, num_layers
        self._generations = generations
        self._limits = limits or IpcLimits()
        self._part = layout.likely_part(message.top_k, block.num_shards)
        self._on_failure, self._clock = on_failure, clock
        place, capacity = device.torch_device, self._limits.job_tokens
        self._job = Job.allocate(message, capacity, place)
        self._partials = torch.zeros(capacity, message.hidden, dtype=message.partial_dtype, device=place)
        self._boxes, self._flags = (
            torch.zeros(block.num_routers, dtype=torch.int64, device=place) for _ in range(2)
        )
        self._host = device.host_words(layout.shard_words(block.num_routers))
        # Single words are written and read several times as fast as through numpy.
        self._host_words = memoryview(self._host.numpy().data)
        self._desk = Desk.allocate(block.num_routers, place, self._host.data_ptr())
        self._demand = Demand(self._limits, self._host_words[layout.ANSWERED :])
        self._served: frozenset[int] = frozenset()
        self._peers: dict[int, _Peer] = {}
        self._counts = DeviceCounts(self._host_words)
        self._refused = self._in_vain = 0
        operands = JobOperands(
            self._desk, self._job, self._partials, self._boxes, self._flags, message, num_layers, self._part
        )
        self._launcher = JobLauncher(device, operands, compute, self._limits, self._host_words, clock)
        self._handover = Handover()
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        device.synchronize()
        self._refresh()

    @property
    def job(self) -> Job:
        """The newest job's rows; to be looked at while nothing is asked."""
        return self._job

    @property
    def buffer_bytes(self) -> int:
        """Of this GPU's memory, the attached routers' inboxes included."""
        job = [tensor for tensor in vars(self._job).values() if tensor is not None]
        desk = [self._desk.inboxes, self._desk.served, self._desk.taken, self._desk.words]
        fixed = [self._partials, self._boxes, self._flags, *desk, *job]
        return sum(tensor.nbytes for tensor in fixed) + len(self._peers) * self._message.inbox_bytes

    @property
    def stats(self) -> IpcStats:
        """From any thread."""
        jobs, messages, joined, tokens = self._counts.add()
        launcher = self._launcher
        return IpcStats(jobs, messages, joined, tokens, self._refused, launcher.launches, launcher.launch_ns)

    @property
    def launching_s(self) -> float:
        """For how long a launch has been under way, 0 for none. From any thread."""
        return self._launcher.launching_s

    def refresh(self) -> None:
        """Other generations are served now; when this returns the device knows."""
        self._handover.call(self._refresh)

    def start(self) -> None:
        """Compiles and captures what jobs run, then serves on a thread of its own. Raises what capturing raised."""
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), name="ep-ipc-server", daemon=True)
        self._handover.open(self._thread)
        self._thread.start()
        ready.wait()
        if self.error is not None:
            raise self.error

    def attach(self, handles: RouterHandles) -> ShardHandles:
        """From now on this router is served; one that was there under the same number is forgotten.

        Raises TransportError for a router of another model or instance, RuntimeError if its memory cannot be mapped.
        """
        if (handles.message, handles.num_shards) != (self._message, self._block.num_shards):
            raise TransportError(
                f"router {handles.router_idx} sends {handles.message} to {handles.num_shards} shards, expected "
                f"{self._message} to {self._block.num_shards}"
            )
        return self._handover.call(lambda: self._attach(handles))

    def detach(self, router_idx: int) -> None:
        """Forgets a router, alive or not; no-op if it is unknown."""
        self._handover.call(lambda: self._detach(router_idx))

    def stop(self) -> None:
        """Jobs that are launched end first."""
        self._is_stopping = True
        if self._thread is not None:
            self._thread.join()

    def capture(self) -> None:
        """What jobs run."""
        self._launcher.capture()
        self._in_vain = self._host_words[layout.DONE]

    def poll(self) -> bool:
        """One look at all mailboxes, and a job if one is due. Whether anything was found."""
        now, words, found = self._clock(), self._block.words, False
        done = self._host_words[layout.DONE]
        in_vain = (done - self._host_words[layout.DONE + 1 + layout.JOBS]) & _MASK
        if in_vain > self._in_vain:
            self._in_vain = in_vain
            self._demand.pause(now)
        for peer in self._peers.values():
            begun, word = words[peer.begun_place], words[peer.place]
            if begun != peer.begun:
                peer.begun, found = begun, True
                rows = layout.likely_rows(layout.begun_rows(begun), self._part)
                self._demand.begin(peer.router_idx, rows, now)
            if word != peer.seen:
                peer.seen, found = word, True
                self._look_at(peer, Header.unpack(word), now)
        if capacity := self._demand.next_job(self._launcher.in_flight(), now):
            self._launcher.launch(capacity)
            if self._launcher.launches % ADD_EVERY == 0:
                self._counts.add()
            found = True
        for peer in self._peers.values():
            if peer.rows:
                self._cover(peer, Header.unpack(peer.seen).seq)
        return found

    def _cover(self, peer: _Peer, seq: int) -> None:
        """Says so to a router if the answer to this message, its newest one, is launched."""
        is_answered = self._host_words[layout.ANSWERED + peer.router_idx] == seq
        if is_answered or self._launcher.is_there(min(peer.rows, self._limits.job_tokens), peer.newest_begun):
            self._block.covered[peer.router_idx, self._shard_idx] = seq
            peer.rows = 0

    def _serve(self, ready: threading.Event) -> None:
        with torch.inference_mode():
            self._serve_until_stopped(ready)

    def _serve_until_stopped(self, ready: threading.Event) -> None:
        try:
            self._device.use()
            self.capture()
            ready.set()
            idle_since = time.perf_counter()
            while not self._is_stopping:
                if self._handover.take():
                    continue
                if self.poll():
                    idle_since = time.perf_counter()
                elif time.perf_counter() - idle_since > self._limits.spin_s:
                    self._rest()
            with self._paused():
                pass
        except Exception as error:
            log.exception("shard %d: serving routers over ipc ended", self._shard_idx)
            self.error = error
            for peer in self._peers.values():
                self._refuse(peer, 0, mailbox.BROKEN, 0)
            if ready.is_set() and self._on_failure is not None:
                self._on_failure()
        finally:
            self._handover.close()
            ready.set()

    def _rest(self) -> None:
        if self._limits.nap_s:
            # Each look may take the interpreter from a router: there is time while jobs wait on the device.
            time.sleep(self._limits.nap_s * (1 + 2 * len(self._launcher.in_flight())))
        else:
            os.sched_yield()

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Inside, the device does nothing: jobs that wait for messages have ended without any."""
        self._host_words[layout.STOP] = 1
        self._device.synchronize()
        try:
            yield
        finally:
            self._device.synchronize()
            self._host_words[layout.STOP] = 0

    def _attach(self, handles: RouterHandles) -> ShardHandles:
        self._detach(handles.router_idx)
        router_idx, shard_idx, message = handles.router_idx, self._shard_idx, self._message
        inbox = self._device.shared_zeros(message.inbox_bytes)
        box = self._device.open(handles.box)
        first = message.partials_offset(handles.num_shards)
        place = self._block.header_place(router_idx, shard_idx)
        newest = Header.unpack(self._block.words[place]).seq  # sent to whoever was here before, or none
        with self._paused():
            self._desk.inboxes[router_idx] = inbox.data_ptr()
            self._desk.taken[router_idx] = torch.tensor([newest, newest, 0, -1])
            self._boxes[router_idx] = box.data_ptr() + first + shard_idx * message.partial_bytes
            self._flags[router_idx] = box.data_ptr() + 4 * shard_idx * message.max_tokens
            self._host_words[layout.ANSWERED + router_idx] = newest
        self._block.refuse(router_idx, shard_idx, 0, 0, 0)  # what was refused to whom, or by whom, is over
        words, begun_place = self._block.words, self._block.begun_place(router_idx)
        self._block.covered[router_idx, shard_idx] = newest
        self._peers[router_idx] = _Peer(
            router_idx, inbox, box, place, begun_place, words[place], words[begun_place]
        )
        self._demand.join(router_idx)
        return ShardHandles(shard_idx, os.getpid(), self._device.share(inbox))

    def _detach(self, router_idx: int) -> None:
        if router_idx not in self._peers:
            return
        with self._paused():
            self._desk.inboxes[router_idx] = 0
        self._demand.leave(router_idx)
        del self._peers[router_idx]

    def _refresh(self) -> None:
        served = frozenset(generation % layout.NUM_GENERATIONS for generation in self._generations())
        assert len(served) <= layout.MAX_SERVED, served
        if served == self._served:
            return
        padded = [*served, *[-1] * (layout.MAX_SERVED - len(served))]
        with self._paused():
            self._desk.served.copy_(torch.tensor(padded, dtype=torch.int32))
        self._served = served
        for peer in self._peers.values():
            if Header.unpack(peer.seen).generation not in served:  # what it still waited for is not answered any more
                self._demand.join(peer.router_idx)
                peer.rows = 0

    def _look_at(self, peer: _Peer, header: Header, now: float) -> None:
        """A new message: for the device to take, or refused. One of no rows is a mailbox that a new router emptied."""
        if not header.num_tokens:
            return
        self._refresh()
        if header.generation not in self._served:
            self._refuse(peer, header.seq, mailbox.OUT_OF_GENERATION, int(self._block.generations[peer.router_idx]))
        elif header.layer_pos >= self._num_layers or header.num_tokens > self._message.max_tokens:
            self._refuse(peer, header.seq, mailbox.OUT_OF_RANGE, header.layer_pos)
        else:
            rows = layout.likely_rows(header.num_tokens, self._part)
            self._demand.note(peer.router_idx, header.seq, rows, now)
            peer.rows, peer.newest_begun = rows, self._launcher.newest_begun()

    def _refuse(self, peer: _Peer, seq: int, code: int, value: int) -> None:
        """If the router waits for this message, its wait ends and its `check` says why."""
        self._refused += 1
        self._block.refuse(peer.router_idx, self._shard_idx, seq, code, value)

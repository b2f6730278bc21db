"""The shard's side of the data plane between GPUs of one node: a thread that turns messages into graph launches.

    headers of all routers ─> poll ─> join what waits for one layer ─> job ring ─> captured graph of the token bucket:
                                                                                   collect ─> experts ─> return

Graphs know no layer and no router: they read both from the job. The flags that a job raises are the routers' to wait
for; nothing comes back here but that it is done.

Shape legend: C rows of a job (capacity), H hidden.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Container
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from ep.compute.base import JobCompute
from ep.errors import OptionError, TransportError
from ep.ipc_jobs import JobRing, Waiting, bucket, join
from ep.kernels import p2p
from ep.kernels import p2p_layout as layout
from ep.kernels.p2p import Job
from ep.kernels.p2p_layout import Header, MessageShape
from ep.transport import mailbox
from ep.transport.ipc_device import IpcDevice, Launch
from ep.transport.ipc_handles import RouterHandles, ShardHandles
from ep.transport.mailbox import MailboxBlock

log = logging.getLogger(__name__)
T = TypeVar("T")
BUSY_S = 2e-4
"""How long the thread spins after work before it rests between looks."""


@dataclass(frozen=True)
class IpcLimits:
    """job_tokens: rows of one job, longer messages take several. graph_tokens: up to here jobs run captured graphs.
    nap_s: how long an idle thread sleeps between two looks, 0 to only offer its core to others."""

    job_tokens: int = 4096
    graph_tokens: int = 256
    nap_s: float = 0.0


@dataclass
class IpcStats:
    """Counted since the server was made. messages: answered; joined: those that shared a job with another. launch_ns:
    from seeing that there is work to having it launched, over all jobs."""

    jobs: int = 0
    launch_ns: int = 0
    messages: int = 0
    joined: int = 0
    tokens: int = 0
    refused: int = 0


@dataclass
class _Peer:
    """A router. taken: the newest header that was seen."""

    router_idx: int
    inbox: torch.Tensor
    box: torch.Tensor
    place: int
    taken: int


class IpcServer:
    """Serves any number of routers, up to the block's. message: what every router must send.

    num_layers: MoE layers; generations: which placements are served, read for every message. on_failure: called by the
    serving thread when it ends by an error, which `error` then is.
    """

    def __init__(
        self,
        device: IpcDevice,
        block: MailboxBlock,
        shard_idx: int,
        message: MessageShape,
        num_layers: int,
        compute: JobCompute,
        generations: Callable[[], Container[int]],
        limits: IpcLimits | None = None,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        supported, reason = p2p.supports(message, block.num_shards, num_layers)
        if not supported:
            raise OptionError(f"ipc: {reason}")
        self.stats = IpcStats()
        self.error: Exception | None = None
        self._device, self._block, self._shard_idx = device, block, shard_idx
        self._message, self._num_layers = message, num_layers
        self._compute, self._generations = compute, generations
        self._limits = limits or IpcLimits()
        self._on_failure = on_failure
        place, capacity = device.torch_device, self._limits.job_tokens
        self._job = Job.allocate(message, capacity, place)
        self._partials = torch.zeros(capacity, message.hidden, dtype=message.partial_dtype, device=place)
        self._words = torch.zeros(layout.NUM_WORDS, dtype=torch.int32, device=place)
        self._inboxes, self._boxes, self._flags = (
            torch.zeros(block.num_routers, dtype=torch.int64, device=place) for _ in range(3)
        )
        self._ring = JobRing(device)
        self._peers: dict[int, _Peer] = {}
        self._waiting: deque[Waiting] = deque()
        self._commands: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._graphs: dict[int, Launch] = {}
        device.synchronize()

    @property
    def job(self) -> Job:
        """The newest job's rows; to be looked at while nothing is asked."""
        return self._job

    @property
    def buffer_bytes(self) -> int:
        """Of this GPU's memory, the attached routers' inboxes included."""
        job = [tensor for tensor in vars(self._job).values() if tensor is not None]
        fixed = [self._partials, self._words, self._inboxes, self._boxes, self._flags, *job]
        return sum(tensor.nbytes for tensor in fixed) + len(self._peers) * self._message.inbox_bytes

    def start(self) -> None:
        """Compiles and captures what jobs run, then serves on a thread of its own. Raises what capturing raised."""
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), name="ep-ipc-server", daemon=True)
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
        return self._on_thread(lambda: self._attach(handles))

    def detach(self, router_idx: int) -> None:
        """Forgets a router, alive or not; no-op if it is unknown."""
        self._on_thread(lambda: self._detach(router_idx))

    def stop(self) -> None:
        """Jobs that are launched end first."""
        self._is_stopping = True
        if self._thread is not None:
            self._thread.join()

    def capture(self) -> None:
        """A graph for every bucket up to the limit; each size is run once without one, which compiles it."""
        limits = self._limits
        most = min(limits.graph_tokens, limits.job_tokens)
        sizes = sorted({bucket(num_tokens) for num_tokens in range(1, most + 1)})
        for capacity in [*sizes, limits.job_tokens]:
            self._ring.post(0, 0, [])
            self._run(capacity)
            self._device.synchronize()
        for capacity in sizes:
            self._graphs[capacity] = self._device.capture(partial(self._run, capacity))

    def poll(self) -> bool:
        """One look at all mailboxes, and a job if there is work and room for one. Whether anything was found."""
        words, found = self._block.words, False
        for peer in self._peers.values():
            word = words[peer.place]
            if word != peer.taken:
                peer.taken = word
                self._take(peer, Header.unpack(word))
                found = True
        if self._waiting and self._ring.has_room:
            self._launch_job()
            found = True
        return found

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
                if self._commands:
                    self._commands.popleft()()
                elif self.poll():
                    idle_since = time.perf_counter()
                elif time.perf_counter() - idle_since > BUSY_S:
                    self._rest()
            self._device.synchronize()
        except Exception as error:
            log.exception("shard %d: serving routers over ipc ended", self._shard_idx)
            self.error = error
            for peer in self._peers.values():
                self._refuse(peer, 0, mailbox.BROKEN, 0)
            if ready.is_set() and self._on_failure is not None:
                self._on_failure()
        finally:
            ready.set()
            while self._commands:
                self._commands.popleft()()

    def _rest(self) -> None:
        if self._limits.nap_s:
            time.sleep(self._limits.nap_s)
        else:
            os.sched_yield()

    def _on_thread(self, work: Callable[[], T]) -> T:
        """Runs work between two polls and returns what it returns."""
        if self._thread is None or not self._thread.is_alive() or threading.current_thread() is self._thread:
            return work()
        result: Future[T] = Future()

        def command() -> None:
            try:
                result.set_result(work())
            except Exception as error:
                result.set_exception(error)

        self._commands.append(command)
        return result.result()

    def _attach(self, handles: RouterHandles) -> ShardHandles:
        self._detach(handles.router_idx)
        router_idx, shard_idx, message = handles.router_idx, self._shard_idx, self._message
        inbox = self._device.shared_zeros(message.inbox_bytes)
        box = self._device.open(handles.box)
        base = box.data_ptr()
        self._inboxes[router_idx] = inbox.data_ptr()
        first = message.partials_offset(handles.num_shards)
        self._boxes[router_idx] = base + first + shard_idx * message.partial_bytes
        self._flags[router_idx] = base + shard_idx * layout.LINE
        self._device.synchronize()
        place = self._block.header_place(router_idx, shard_idx)
        self._peers[router_idx] = _Peer(router_idx, inbox, box, place, self._block.words[place])
        return ShardHandles(shard_idx, os.getpid(), self._device.share(inbox))

    def _detach(self, router_idx: int) -> None:
        if router_idx not in self._peers:
            return
        self._waiting = deque(one for one in self._waiting if one.router_idx != router_idx)
        self._device.synchronize()
        del self._peers[router_idx]

    def _take(self, peer: _Peer, header: Header) -> None:
        """A new message: to be served, or refused. One of no rows is a mailbox that a new router has emptied."""
        if not header.num_tokens:
            return
        generation = int(self._block.generations[peer.router_idx])
        if generation not in self._generations():
            self._refuse(peer, header.seq, mailbox.OUT_OF_GENERATION, generation)
        elif header.layer_pos >= self._num_layers or header.num_tokens > self._message.max_tokens:
            self._refuse(peer, header.seq, mailbox.OUT_OF_RANGE, header.layer_pos)
        else:
            self._waiting.append(Waiting(peer.router_idx, header))

    def _refuse(self, peer: _Peer, seq: int, code: int, value: int) -> None:
        """The router's wait ends, and its `check` says why."""
        self.stats.refused += 1
        self._block.refusals[peer.router_idx, self._shard_idx] = (seq, code, value)
        self._block.routers[peer.router_idx, layout.ABORT] = 1

    def _launch_job(self) -> None:
        start = time.perf_counter_ns()
        joined = join(self._waiting, self._limits.job_tokens)
        self._waiting = joined.left
        self._ring.post(joined.layer_pos, joined.num_rows, joined.parts)
        graph = self._graphs.get(bucket(joined.num_rows))
        if graph is not None:
            graph()
        else:
            self._run(joined.num_rows)
        stats = self.stats
        stats.jobs += 1
        stats.launch_ns += time.perf_counter_ns() - start
        stats.messages += sum(part.is_last for part in joined.parts)
        stats.joined += len(joined.parts) if len(joined.parts) > 1 else 0
        stats.tokens += joined.num_rows

    def _run(self, capacity: int) -> None:
        launch, job, message = self._device.launch, self._job, self._message
        launch(p2p.collect, self._ring.address, self._ring.size, self._inboxes, self._words, message, job, capacity)
        self._compute(job, capacity, self._partials[:capacity])
        launch(p2p.return_partials, self._partials, job, self._boxes, self._flags, self._words, self._ring.done_address,
               capacity)  # fmt: skip

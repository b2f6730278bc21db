"""Shards for `ep bench transport --transport ipc`: in processes of their own, or as threads of this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

import torch

from ep.compute.base import JobCompute
from ep.errors import TransportError
from ep.ipc_jobs import IpcLimits
from ep.ipc_server import IpcServer
from ep.ipc_stats import IpcStats
from ep.kernels.p2p import Job
from ep.kernels.p2p_layout import MessageShape
from ep.transport.ipc_device import GpuDevice
from ep.transport.ipc_handles import RouterHandles, ShardHandles
from ep.transport.mailbox import MailboxBlock

START_S = 120.0


@dataclass(frozen=True)
class ShardSetup:
    """make_compute: a function that a new process can import, called there."""

    block: str
    num_routers: int
    num_shards: int
    shard_idx: int
    gpu: int
    message: MessageShape
    num_layers: int
    limits: IpcLimits
    make_compute: Callable[[ShardSetup], JobCompute]


@dataclass(frozen=True)
class SeenJob:
    """What came in with a shard's newest job, in host memory. Rows and scales as bytes: not every dtype pickles."""

    rows: torch.Tensor
    scales: torch.Tensor | None
    slot_ids: torch.Tensor
    weights: torch.Tensor


class BenchShard(Protocol):
    """One shard, wherever it runs."""

    def attach(self, handles: RouterHandles) -> ShardHandles: ...

    def newest_job(self, num_tokens: int) -> SeenJob:
        """Of so many rows; while nothing is asked of it."""
        ...

    def stats(self) -> IpcStats: ...

    def stop(self) -> None: ...


class FixedPartials:
    """A JobCompute that computes nothing: every job's answer is `payload`, row by row."""

    def __init__(self, setup: ShardSetup) -> None:
        self._payload = payload(setup.message, setup.limits.job_tokens, setup.shard_idx).to(f"cuda:{setup.gpu}")

    def __call__(self, job: Job, capacity: int, out: torch.Tensor) -> None:
        if not torch.cuda.is_current_stream_capturing():
            out.copy_(self._payload[:capacity])


def payload(message: MessageShape, num_rows: int, shard_idx: int) -> torch.Tensor:
    """Another one for every shard, the same in every process."""
    generator = torch.Generator().manual_seed(shard_idx)
    return torch.randn(num_rows, message.hidden, generator=generator).to(message.partial_dtype)


class ThreadShard:
    """On a stream and a thread of its own, in this process."""

    def __init__(self, setup: ShardSetup) -> None:
        torch.cuda.set_device(setup.gpu)
        block = MailboxBlock.open(setup.block, setup.num_routers, setup.num_shards)
        device = GpuDevice(setup.gpu, own_stream=True)
        compute = setup.make_compute(setup)
        self._block = block
        self._server = IpcServer(
            device, block, setup.shard_idx, setup.message, setup.num_layers, compute, lambda: (0,), setup.limits
        )
        self._server.start()

    def attach(self, handles: RouterHandles) -> ShardHandles:
        return self._server.attach(handles)

    def newest_job(self, num_tokens: int) -> SeenJob:
        job = self._server.job

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:num_tokens].contiguous().view(torch.uint8).cpu()

        scales = None if job.scales is None else rows(job.scales)
        return SeenJob(
            rows(job.rows), scales, job.slot_ids[:num_tokens].cpu(), job.weights[:num_tokens].cpu()
        )

    def stats(self) -> IpcStats:
        return self._server.stats

    def stop(self) -> None:
        self._server.stop()
        self._block.close()


class ProcessShard:
    """In a process of its own. Raises TransportError if that does not come up."""

    def __init__(self, setup: ShardSetup) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(setup, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._answer("ready")

    def attach(self, handles: RouterHandles) -> ShardHandles:
        return self._ask("attach", handles)

    def newest_job(self, num_tokens: int) -> SeenJob:
        return self._ask("newest_job", num_tokens)

    def stats(self) -> IpcStats:
        return self._ask("stats")

    def stop(self) -> None:
        if self.process.is_alive():
            self._ask("stop")
            self.process.join(START_S)

    def kill(self) -> None:
        """As a crash does."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def _ask(self, *command: object):  # type: ignore[no-untyped-def]
        self._pipe.send(command)
        return self._answer(str(command[0]))

    def _answer(self, what: str):  # type: ignore[no-untyped-def]
        return answer(self._pipe, START_S, f"the shard's process gave no answer to {what!r}; its messages are above")


def answer(pipe: Connection, timeout_s: float, complaint: str):  # type: ignore[no-untyped-def]
    """What a process at the other end says next. Raises TransportError with the complaint if it ends or is silent."""
    try:
        if pipe.poll(timeout_s):
            return pipe.recv()
    except EOFError:
        pass
    raise TransportError(complaint)


def answer_calls(served: object, pipe: Connection, last: str | None = None) -> bool:
    """Calls of its methods as they come, a name and arguments: True when `last` is answered, False when the other end
    is gone."""
    while True:
        try:
            name, *arguments = pipe.recv()
        except EOFError:
            return False
        pipe.send(getattr(served, name)(*arguments))
        if name == last:
            return True


def _serve(setup: ShardSetup, pipe: Connection) -> None:
    shard = ThreadShard(setup)
    pipe.send("ready")
    if not answer_calls(shard, pipe, last="stop"):
        shard.stop()

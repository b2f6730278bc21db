"""What a shard's jobs run on the device: captured graphs of a few sizes, and how many of them are there.

    launch ─> take ─> collect ─> experts ─> return

Shape legend: C rows of a job (capacity), N routers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ep.compute.base import JobCompute
from ep.ipc_jobs import DECODE_ROWS, PROMPT_PATIENCE, IpcLimits, bucket
from ep.kernels import p2p
from ep.kernels import p2p_layout as layout
from ep.kernels.p2p import Desk, Job
from ep.kernels.p2p_layout import MessageShape
from ep.transport.ipc_device import IpcDevice, Launch

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class JobOperands:
    """What every job reads and writes. partials [C, H]; boxes and flags [N] int64: of the routers' return boxes. part:
    likely_part of the shards."""

    desk: Desk
    job: Job
    partials: torch.Tensor
    boxes: torch.Tensor
    flags: torch.Tensor
    message: MessageShape
    num_layers: int
    part: int


class JobLauncher:
    """For one thread, `launching_s` but for any. host_words: the shard's, in which the device says how many have
    ended."""

    def __init__(
        self,
        device: IpcDevice,
        operands: JobOperands,
        compute: JobCompute,
        limits: IpcLimits,
        host_words: memoryview,
        clock: Callable[[], float],
    ) -> None:
        self._device, self._operands, self._compute, self._limits = device, operands, compute, limits
        self._host_words, self._clock = host_words, clock
        self._graphs: dict[int, Launch] = {}
        self._launched = 0
        self._running: deque[tuple[int, int]] = deque()  # how many were launched with it, and its capacity
        self._began: float | None = None
        self.launches = self.launch_ns = 0

    @property
    def launching_s(self) -> float:
        """For how long a launch has been under way, 0 for none."""
        began = self._began
        return 0.0 if began is None else self._clock() - began

    def in_flight(self) -> list[int]:
        """Of the jobs that are launched and have not ended, for how many rows each is."""
        done = self._host_words[layout.DONE]
        while self._running and not self._is_past(self._running[0][0], done):
            self._running.popleft()
        return [capacity for _, capacity in self._running]

    def newest_begun(self) -> int:
        """The newest job that may have begun to look: those behind it find what has come until now."""
        done = self._host_words[layout.DONE]
        return done + bool(self.in_flight())

    def is_there(self, num_rows: int, behind: int) -> bool:
        """Whether a job for so many rows is launched behind that one, and has not ended."""
        self.in_flight()
        return any(self._is_past(job, behind) and capacity >= num_rows for job, capacity in self._running)

    @staticmethod
    def _is_past(job: int, other: int) -> bool:
        return 0 < (job - other) & _MASK < 1 << 31

    def capture(self) -> None:
        """A graph for every bucket up to the limit; each size is run once without one, which compiles it, and some of
        those above the limit."""
        limits = self._limits
        most = min(limits.graph_tokens, limits.job_tokens)
        sizes = sorted({bucket(num_tokens) for num_tokens in range(1, most + 1)})
        larger = {min(bucket(most << power), limits.job_tokens) for power in range(1, 16)} if most else set()
        for capacity in sorted({*sizes, *larger, limits.job_tokens}):
            self._run(capacity)
            self._device.synchronize()
        for capacity in sizes:
            self._graphs[capacity] = self._device.capture(partial(self._run, capacity))
        self._launched = self._host_words[layout.DONE]

    def launch(self, capacity: int) -> None:
        start, self._began = time.perf_counter_ns(), self._clock()
        graph = self._graphs.get(capacity)
        if graph is not None:
            graph()
        else:
            self._run(capacity)
        self._began = None
        self._launched = (self._launched + 1) & _MASK
        self._running.append((self._launched, capacity))
        self.launches += 1
        self.launch_ns += time.perf_counter_ns() - start

    def _run(self, capacity: int) -> None:
        launch, of, limits = self._device.launch, self._operands, self._limits
        sizes = (capacity, limits.job_tokens, of.part)
        patience = limits.patience if capacity <= DECODE_ROWS else PROMPT_PATIENCE * limits.patience
        waiting = (patience, limits.window, limits.whole_rows)
        launch(p2p.take, of.desk, of.message, of.num_layers, of.job, *sizes, *waiting)
        launch(p2p.collect, of.desk, of.message, of.job, capacity)
        self._compute(of.job, capacity, of.partials[:capacity])
        launch(p2p.return_partials, of.partials, of.job, of.boxes, of.flags, of.desk, capacity)

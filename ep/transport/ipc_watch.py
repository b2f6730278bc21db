"""The thread that ends a router's waits on the device when the shard that is awaited is lost or late or refuses, or
when the wait itself keeps this process from going on."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ep.kernels import p2p_layout as layout
from ep.transport.liveness import ProcessSentinel

log = logging.getLogger(__name__)
WATCH_S = 0.05
"""How often it looks."""

STUCK_S = 0.2
"""A launch that takes longer waits for the device to be idle. One that only was slow costs a step."""

IsLost = Callable[[int], str | None]
"""Called with a shard that is awaited: why it will not answer, None if it may."""


class WaitWatch:
    """host: the router's words in host memory. is_lost: what else is known about shards than whether their processes
    run. abort: called with a shard that is lost, and why. note_refusals: called with the number of the message that is
    awaited, whether a shard refuses it. Holds `lock` while it looks.

    launching_s: for how long a shard in this process has been at a launch, where there is one. A GPU may load what has
    not run before only when it is idle: a router that does so while it waits for a shard whose own router does the same
    would wait for ever. is_stuck: set when waits were ended for that.
    """

    def __init__(
        self,
        router_idx: int,
        host: npt.NDArray[np.int32],
        num_shards: int,
        deadline_s: float,
        is_lost: IsLost | None,
        abort: Callable[[int, str], None],
        note_refusals: Callable[[int], bool],
    ) -> None:
        self.lock = threading.Lock()
        self.is_lost = is_lost
        self.launching_s: Callable[[], float] = lambda: 0.0
        self.is_stuck = False
        self._unstuck = float("-inf")
        self._waiting: int | None = None
        self._since = 0.0
        self._router_idx, self._host, self._num_shards, self._deadline_s = router_idx, host, num_shards, deadline_s
        self._abort, self._note_refusals = abort, note_refusals
        self._sentinels: dict[int, ProcessSentinel] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ep-ipc-watchdog", daemon=True)
        self._thread.start()

    def watch_process(self, shard_idx: int, pid: int) -> None:
        """In place of the process that was watched before."""
        before = self._sentinels.pop(shard_idx, None)
        if pid != os.getpid():
            self._sentinels[shard_idx] = ProcessSentinel(pid)
        if before is not None:
            before.close()

    def find_loss(self, shard_idx: int) -> str | None:
        """Why this shard will not answer any more, as far as can be told."""
        sentinel = self._sentinels.get(shard_idx)
        if sentinel is not None and sentinel.has_ended():
            return f"its process {sentinel.pid} ended"
        return None if self.is_lost is None else self.is_lost(shard_idx)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        for sentinel in self._sentinels.values():
            sentinel.close()

    def _watch(self) -> None:
        try:
            while not self._closing.wait(WATCH_S):
                self.look()
        except BaseException:
            self._host[layout.ABORT] = 1  # rather than to wait unwatched
            raise

    def look(self) -> None:
        """Sets the abort word for a wait that is not to be answered; the thread does it every WATCH_S."""
        host = self._host
        with self.lock:
            waiting = int(host[layout.WAITING_SEQ])
            if waiting == host[layout.DONE_SEQ] or host[layout.ABORT]:
                self._waiting = None
                return
            if waiting != self._waiting:
                self._waiting, self._since = waiting, time.monotonic()
            self._look_at(waiting, time.monotonic() - self._since)

    def _look_at(self, seq: int, waited_s: float) -> None:
        for shard_idx in range(self._num_shards):
            reason = self.find_loss(shard_idx)
            if reason is not None:
                log.warning("router %d: shard %d is lost: %s", self._router_idx, shard_idx, reason)
                self._abort(shard_idx, reason)
        if self._note_refusals(seq):
            self._host[layout.ABORT] = 1
        launching_s = self.launching_s()
        # Once for each launch: one that goes on when the device is idle waits for something else.
        if launching_s > STUCK_S and time.monotonic() - launching_s > self._unstuck:
            self._unstuck = time.monotonic()
            log.warning("router %d: a launch beside it waits for its step, which is tried again", self._router_idx)
            self.is_stuck = True
            self._host[layout.ABORT] = 1
        if waited_s > self._deadline_s:
            log.warning("router %d: no answer within %g s", self._router_idx, self._deadline_s)
            self._host[layout.ABORT] = 1

"""What an ipc server has done."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ep.kernels import p2p_layout as layout

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class IpcStats:
    """Counted since the server was made. jobs: that found messages; messages: answered; joined: parts of jobs that had
    several; tokens: rows. launches: of jobs, those that found nothing among them, and launch_ns: what they took."""

    jobs: int = 0
    messages: int = 0
    joined: int = 0
    tokens: int = 0
    refused: int = 0
    launches: int = 0
    launch_ns: int = 0


class DeviceCounts:
    """The sums of a shard's device, by what they count (kernels/p2p_layout.py JOBS ...). words: the shard's in host
    memory; the sums there wrap around, so that `add` is to be called before they do so twice."""

    def __init__(self, words: memoryview) -> None:
        self._words, self._counts, self._lock = words, [0] * layout.NUM_COUNTS, threading.Lock()

    def add(self) -> list[int]:
        """All there is until now. From any thread."""
        sums = self._words[layout.DONE + 1 : layout.DONE + 1 + layout.NUM_COUNTS]
        with self._lock:
            for place, count in enumerate(sums):
                self._counts[place] += (count - self._counts[place]) & _MASK
            return list(self._counts)

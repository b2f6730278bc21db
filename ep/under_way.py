"""Steps that are launched and not yet known to have ended, as their router remembers them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ep.link_stats import LinkStats
from ep.recorder import LoadRecorder

MAX_UNDER_WAY = 16
"""Steps that are launched before the first of them is asked about; older ones are forgotten."""


@dataclass
class UnderWay:
    """The first num_decode of its num_tokens are decode; rows: of its batch, that are this router's. began: on
    time.monotonic's clock; wall: seconds since 1970."""

    num_tokens: int
    num_decode: int
    generation: int
    rows: slice
    began: float = field(default_factory=time.monotonic)
    wall: float = field(default_factory=time.time)

    def counted(self) -> tuple[int, int]:
        """This router's tokens, and how many of them are decode."""
        mine = range(self.num_tokens)[self.rows]
        return len(mine), len(range(min(mine.start, self.num_decode), min(mine.stop, self.num_decode)))

    def record(self, recorder: LoadRecorder, links: Sequence[LinkStats]) -> None:
        """It has ended, now; its layers are counted elsewhere."""
        seconds = time.monotonic() - self.began
        recorder.add_step(links, self.wall, seconds, *self.counted(), self.generation)


class StepsUnderWay:
    """Of one router, numbered from 1 on; newest: the number of the last one that has begun, 0 before there is one. Any
    thread may end them."""

    def __init__(self) -> None:
        self.newest = 0
        self._known: dict[int, UnderWay] = {}
        self._lock = threading.Lock()

    def begin(self, step: UnderWay) -> int:
        """Its number."""
        with self._lock:
            self.newest += 1
            self._known[self.newest] = step
            self._known.pop(self.newest - MAX_UNDER_WAY, None)
            return self.newest

    def end(self, number: int) -> UnderWay | None:
        """None for one that has ended already or is forgotten."""
        with self._lock:
            return self._known.pop(number, None)


def decode_tokens(num_tokens: int, num_requests: int, num_decode: int | None) -> int:
    """num_decode, or where that is not known: all of a step with a token per request, else none."""
    if num_decode is not None:
        return num_decode
    return num_tokens if num_tokens == num_requests else 0

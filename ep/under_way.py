"""A step that is launched and not yet known to have ended, as its router remembers it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ep.link_stats import LinkStats
from ep.recorder import LoadRecorder
from ep.share import ALL_ROWS

MAX_UNDER_WAY = 16
"""Steps that are launched before the first of them is asked about; older ones are forgotten."""


@dataclass
class UnderWay:
    """The first num_decode of its num_tokens are decode; rows: of its batch, that are this router's. began: on
    time.monotonic's clock; wall: seconds since 1970."""

    num_tokens: int
    num_decode: int
    generation: int
    rows: slice = field(default_factory=lambda: ALL_ROWS)
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


def decode_tokens(num_tokens: int, num_requests: int, num_decode: int | None) -> int:
    """num_decode, or where that is not known: all of a step with a token per request, else none."""
    if num_decode is not None:
        return num_decode
    return num_tokens if num_tokens == num_requests else 0

"""When a shard's host launches its next job, and how large it is, from the headers that it sees and what comes back.

    steps and headers of all routers ─> Demand ─> rows of the next job ─> launched ─> waits on the device ─> ended
                                          ^──────────────────────── answered ─────────────────────────────────┘

A job takes what it finds when its turn comes (kernels/p2p.py `take`), which the host does not choose. A router's device
says how large its messages will be when it begins a step, which is before the first of them is there. Nothing is
launched here, and the clock is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

RECENT_S = 0.02
"""For so long after a message its router may send another of that size at any moment."""
RETRY_S = 1e-3
"""After a job that found nothing, for a message that the host has seen: how long until another one looks for it."""
DECODE_ROWS = 256
"""Of larger jobs two at a time are enough: they take longer than a launch, and what comes next may be small again."""
PROMPT_PATIENCE = 8
"""Times as many looks for messages of more rows: attention to a prompt takes longer from one layer to the next."""


@dataclass(frozen=True)
class IpcLimits:
    """job_tokens: rows of one job, longer messages take several. graph_tokens: up to here jobs run captured graphs.

    depth: jobs on the device at a time. linger_s: for how long after a message jobs are kept waiting there for the next
    one, 0 to launch one only for a message that is there. patience: looks of such a job before it ends; window: looks
    that it takes to read a layer's experts, which a job of whole_rows does: what it is worth to wait for other routers
    (kernels/p2p.py `take`). spin_s: for how long the thread that launches looks again at once; nap_s: how long it then
    sleeps between two looks if no job is on the device, 0 to only offer its core to others.
    """

    job_tokens: int = 4096
    graph_tokens: int = 256
    depth: int = 1
    linger_s: float = 0.0
    patience: int = 0
    window: int = 0
    whole_rows: int = 1
    spin_s: float = 2e-4
    nap_s: float = 0.0


@dataclass
class _Asker:
    """A router: its newest message, how many rows that or those of its newest step have, and when it was seen."""

    seq: int | None = None
    rows: int = 0
    seen: float = float("-inf")


class Demand:
    """What is asked of a shard. answered: by router, the newest message that is answered, kept up by the device."""

    def __init__(self, limits: IpcLimits, answered: Sequence[int]) -> None:
        self._limits, self._answered = limits, answered
        self._askers: dict[int, _Asker] = {}
        self._last = self._retry = float("-inf")

    def join(self, router_idx: int) -> None:
        """A router of which nothing is known yet, or any more."""
        self._askers[router_idx] = _Asker()

    def leave(self, router_idx: int) -> None:
        del self._askers[router_idx]

    def note(self, router_idx: int, seq: int, num_rows: int, now: float) -> None:
        """A message that is to be answered."""
        self._askers[router_idx] = _Asker(seq, num_rows, now)
        self._last, self._retry = now, float("-inf")

    def begin(self, router_idx: int, num_rows: int, now: float) -> None:
        """A step of a router, all of whose messages are answered: the next ones will have so many rows."""
        asker = self._askers[router_idx]
        asker.rows, asker.seen = num_rows, now
        self._last, self._retry = now, float("-inf")

    def pause(self, now: float) -> None:
        """A job has looked in vain: none is kept waiting until the next message."""
        self._last, self._retry = float("-inf"), now + RETRY_S

    def next_job(self, in_flight: Sequence[int], now: float) -> int:
        """Rows of the job that is to be launched beside those on the device, which are for so many; 0 for none."""
        is_lingering = now - self._last < self._limits.linger_s
        if not is_lingering and (in_flight or now < self._retry):
            return 0
        waiting = [router for router, one in self._askers.items() if one.seq not in (None, self._answered[router])]
        if not waiting and not is_lingering:
            return 0
        askers = self._askers.items()
        rows = sum(one.rows for router, one in askers if router in waiting or now - one.seen < RECENT_S)
        capacity = min(bucket(max(rows, 1)), self._limits.job_tokens)
        depth = self._limits.depth if capacity <= DECODE_ROWS else min(self._limits.depth, 2)
        # Those that leave such messages to a larger one are not in its way, nor of any use.
        fitting = sum(2 * size >= rows or size == self._limits.job_tokens for size in in_flight)
        return capacity if fitting < depth and len(in_flight) < 2 * self._limits.depth else 0


def bucket(num_rows: int) -> int:
    """The captured capacity for so many rows: 1, 2, 4, multiples of 8 up to 256, of 64 up to 1,024, then of 512."""
    step = 8 if num_rows <= 256 else 64 if num_rows <= 1024 else 512
    return next((size for size in (1, 2, 4) if num_rows <= size), -(-num_rows // step) * step)

"""What a router counts of its traffic with one shard, from its start on. Pure: no I/O."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ep.load import NUM_ROUND_TRIP_BUCKETS, ROUND_TRIP_BOUNDS_US, LinkWindow

NUM_ROUND_TRIPS = 512
COUNTERS = tuple(field.name for field in fields(LinkWindow) if field.name != "round_trips")
"""The numbers of a link that only grow, in the order of LinkWindow."""

_BOUNDS_US: list[float] = ROUND_TRIP_BOUNDS_US.tolist()


@dataclass
class LinkStats:
    """Traffic with one shard. compute_ns is what the shard says; round_trips_us the latest, from dispatch to answer.

    histogram: how many round trips lie in each bucket of ROUND_TRIP_BOUNDS_US. round_trip_us_sum: of all of them.
    """

    tokens: int = 0
    pairs: int = 0
    requests: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    compute_ns: int = 0
    round_trip_us_sum: float = 0.0
    histogram: list[int] = field(default_factory=lambda: [0] * NUM_ROUND_TRIP_BUCKETS)
    round_trips_us: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(NUM_ROUND_TRIPS))

    def count(self, tokens: int, pairs: int, bytes_in: int, compute_ns: int, round_trip_us: float) -> None:
        """One dispatch was answered."""
        self.round_trips_us[self.requests % NUM_ROUND_TRIPS] = round_trip_us
        self.round_trip_us_sum += round_trip_us
        self.histogram[bisect_left(_BOUNDS_US, round_trip_us)] += 1
        self.requests += 1
        self.tokens += tokens
        self.pairs += pairs
        self.bytes_in += bytes_in
        self.compute_ns += compute_ns

    def counters(self) -> list[int]:
        """COUNTERS, then the histogram, as they stand now."""
        numbers = (self.tokens, self.pairs, self.requests, self.bytes_out, self.bytes_in, self.compute_ns)
        return [*numbers, *self.histogram]

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["round_trips_us"] = self.round_trips_us[: sum(self.histogram)].tolist()  # fewer than requests over ipc
        return values


def link_window(before: Sequence[int], after: Sequence[int]) -> LinkWindow:
    """What was added between two `LinkStats.counters` of one link."""
    added = np.subtract(after, before, dtype=np.int64)
    num = len(COUNTERS)
    return LinkWindow(**dict(zip(COUNTERS, added[:num].tolist())), round_trips=added[num:])

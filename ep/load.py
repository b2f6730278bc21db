"""Expert load as it is recorded: counts per window, the traffic of each link, changes of placement. Pure: no I/O.

Shape legend: L MoE layers, S shards, E logical experts, K top-k, N sampled tokens, B round-trip
buckets. The layer axis is the position among the MoE layers, as in a placement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ep.placement import Placement

Int64Array = npt.NDArray[np.int64]
Phase = Literal["prefill", "decode", "all"]
PHASES: tuple[Phase, ...] = ("prefill", "decode", "all")

ROUND_TRIP_BOUNDS_US: npt.NDArray[np.float64] = 2.0 ** (np.arange(3 * 4, 24 * 4 + 1) / 4)
"""Upper bounds of the round-trip buckets: 8 µs to 16.8 s, four to an octave, so a quantile is read to within 9%."""
NUM_ROUND_TRIP_BUCKETS = len(ROUND_TRIP_BOUNDS_US) + 1
"""B: bucket i holds round trips above bound i - 1 and up to bound i; the last, those above all bounds."""


@dataclass(frozen=True, eq=False)
class LinkWindow:
    """One router's traffic with one shard in one window.

    tokens: rows sent, a token once for each layer. pairs: (token, slot) among them. requests: dispatches. bytes_out,
    bytes_in: payload bytes to the shard and back. compute_ns: time of the experts alone, as the shard says.
    round_trips: int64 [B], how many dispatches were answered within each bucket of ROUND_TRIP_BOUNDS_US.
    """

    tokens: int
    pairs: int
    requests: int
    bytes_out: int
    bytes_in: int
    compute_ns: int
    round_trips: Int64Array


@dataclass(frozen=True, eq=False)
class Window:
    """What one router counted over some steps, all under one generation of the placement.

    start: seconds since 1970; seconds: how long the window lasted. num_prefill_tokens, num_decode_tokens: tokens that
    entered the model. prefill, decode: int64 [L, E], (token, expert) pairs of each logical expert. links: one for each
    shard. sampled_ids: int16 [N, L, K], the experts of a few sampled tokens in every layer; N may be 0.
    step_seconds_p50, step_seconds_p99: quantiles of the window's step times. router: rank of the router.
    """

    start: float
    seconds: float
    first_step: int
    num_steps: int
    generation: int
    num_prefill_tokens: int
    num_decode_tokens: int
    prefill: Int64Array
    decode: Int64Array
    links: tuple[LinkWindow, ...]
    sampled_ids: npt.NDArray[np.int16]
    step_seconds_p50: float
    step_seconds_p99: float
    router: int = 0

    def counts(self, phase: Phase) -> Int64Array:
        """int64 [L, E]."""
        return self.prefill + self.decode if phase == "all" else getattr(self, phase)


@dataclass(frozen=True)
class PlacementChange:
    """The routers went over to another placement.

    time: seconds since 1970. reason: what asked for it. moved_bytes, seconds: what the move took. predicted_gain: how
    much of the busiest shards' load, summed over layers, the new placement was expected to take away (0.2: 20%).
    """

    time: float
    old_generation: int
    placement: Placement
    reason: str
    moved_bytes: int
    seconds: float
    predicted_gain: float

    @property
    def new_generation(self) -> int:
        return self.placement.generation


def totals(
    windows: Iterable[Window], shape: tuple[int, int], phase: Phase = "all", generation: int | None = None
) -> Int64Array:
    """int64 [L, E] of shape `shape`: the windows' counts added up, those of one generation only where one is given."""
    total = np.zeros(shape, dtype=np.int64)
    for window in windows:
        if generation is None or window.generation == generation:
            total += window.counts(phase)
    return total


def round_trip_histogram(times_us: npt.ArrayLike) -> Int64Array:
    """int64 [B]: how many of the times, in µs, lie in each bucket of ROUND_TRIP_BOUNDS_US."""
    buckets = np.searchsorted(ROUND_TRIP_BOUNDS_US, np.asarray(times_us, dtype=np.float64), side="left")
    return np.bincount(buckets, minlength=NUM_ROUND_TRIP_BUCKETS).astype(np.int64)


def round_trip_quantile(histogram: Int64Array, quantile: float) -> float | None:
    """The quantile in µs, None of an empty histogram.

    Interpolated geometrically within its bucket; the two open buckets answer with their one bound.
    """
    total = int(histogram.sum())
    if total == 0:
        return None
    below = np.cumsum(histogram)
    bucket = int(np.searchsorted(below, quantile * total, side="left"))
    bucket = min(max(bucket, int(np.flatnonzero(histogram)[0])), NUM_ROUND_TRIP_BUCKETS - 1)
    if bucket in (0, NUM_ROUND_TRIP_BUCKETS - 1):
        return float(ROUND_TRIP_BOUNDS_US[min(bucket, len(ROUND_TRIP_BOUNDS_US) - 1)])
    low, high = ROUND_TRIP_BOUNDS_US[bucket - 1], ROUND_TRIP_BOUNDS_US[bucket]
    inside = (quantile * total - (below[bucket] - histogram[bucket])) / histogram[bucket]
    return float(low * (high / low) ** min(max(inside, 0.0), 1.0))

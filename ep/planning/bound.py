"""How good any placement could be: lower bounds on the busiest shard's load under an equal split over replicas.

Shape legend: B problems (MoE layers, or their nodes), E logical experts, S shards, R redundant slots, N = E + R
replicas, q replicas on one shard.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ep.planning.replicas import fewest, highest_averages

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

SLACK = 1e-9
"""Relative: keeps rounding from proving anything."""
PRECISION = 5e-4
"""Relative: how near to what it can prove the search for a bound comes."""
MAX_SHARED, MAX_HOTTEST, MAX_SPEND = 12, 8, 128
"""How far the two arguments go: replicas on a shard, experts, extra replicas."""


def simple_bound(loads: Float64Array, num_shards: int, num_redundant: int) -> Float64Array:
    """The mean load of the shards, or the largest load per replica where that is more, float64 [B].

    No counts of E + R replicas have a smaller largest load per replica than highest averages: giving an expert less
    raises it above the average that it had when it was served.
    """
    counts = highest_averages(loads, num_redundant, num_shards)
    return np.maximum(loads.sum(axis=1) / num_shards, (loads / counts).max(axis=1))


def lower_bound(
    loads: Float64Array, num_shards: int, num_redundant: int, below: Float64Array | None = None
) -> Float64Array:
    """The largest load that provably some shard of any placement has, float64 [B].

    loads: [B, E]. below: [B], loads that a plan reached, where the search for a bound may end. Placements have E + R
    filled slots, each shard floor(N / S) or one more, an expert at most once per shard.

    Starts from `simple_bound` and bisects over T, refuting that all shards can have at most T. Any such placement
    gives expert e, of load w_e, at least c_e = ceil(w_e / T) replicas. That leaves x = N - sum(c_e) to give. It cannot
    exist if x < 0, some c_e > S, or one of these holds.

    1. Pigeonholes. A shard has at most q - 1 replicas larger than T / q, so all have at most S (q - 1). An expert with
       c_e larger ones loses them only by getting ceil(w_e q / T) replicas. The fewest larger ones for x extra replicas
       are a knapsack problem; its fractional relaxation bounds them from below.
    2. Company. The r replicas of expert e lie on r shards of at least k = floor(N / S) slots, so that
       r T >= w_e + (the r (k - 1) other replicas there). With r - c_e of the x spent on e and y left, experts f with
       c_f = 1 that get a share of y have at most 2 y replicas together; count those as weightless. The other slots hold
       experts f with one replica of w_f, each once, or replicas of experts with c_f > 1, of at least w_f / (c_f + x):
       at least the sum of the r (k - 1) - 2 y lightest of these.
    """
    low = simple_bound(loads, num_shards, num_redundant)
    high = np.maximum(2 * low if below is None else below, low)
    middle = high * (1 - PRECISION / 2)  # first what would make a plan as good as optimal
    while True:
        rows = np.flatnonzero(high > low * (1 + PRECISION))
        if not len(rows):
            return low
        tried = np.maximum(middle, low)[rows]
        refuted = _refuted(loads[rows], tried, num_shards, num_redundant)
        low[rows] = np.where(refuted, tried, low[rows])
        high[rows] = np.where(refuted, high[rows], tried)
        middle = (low + high) / 2


def _refuted(loads: Float64Array, limit: Float64Array, num_shards: int, num_redundant: int) -> BoolArray:
    """bool [B]: no placement has all shards at most at limit [B]."""
    limit = np.where(limit > 0, limit, 1.0) * (1 + SLACK)
    counts = fewest(loads, limit)
    extra = loads.shape[1] + num_redundant - counts.sum(axis=1)
    most_slots = -(-(loads.shape[1] + num_redundant) // num_shards)
    refuted = (extra < 0) | (counts > num_shards).any(axis=1)
    for shared in range(2, min(most_slots, MAX_SHARED) + 1):
        refuted |= _fewest_above(loads, limit / shared, counts, extra, num_shards) > num_shards * (shared - 1)
    return refuted | _lacks_company(loads, limit, counts, extra, num_shards)


def _fewest_above(
    loads: Float64Array, size: Float64Array, counts: Int64Array, extra: Int64Array, num_shards: int
) -> Int64Array:
    """Replicas [B] that are larger than size [B] in any placement with at least `counts` and `extra` more."""
    large = loads / counts > size[:, None]
    needed = np.ceil(loads / size[:, None] * (1 - SLACK))
    cost = np.where(large & (needed <= num_shards), needed - counts, np.inf)
    saved = np.where(np.isfinite(cost), counts, 0)
    order = np.argsort(cost / counts, axis=1)
    cost, saved = np.take_along_axis(cost, order, axis=1), np.take_along_axis(saved, order, axis=1)
    finite = np.where(np.isfinite(cost), cost, 0)
    left = extra[:, None] - (np.cumsum(finite, axis=1) - finite)
    share = np.where(finite > 0, np.clip(left / np.maximum(finite, 1), 0.0, 1.0), 0.0)
    rest = np.where(large, counts, 0).sum(axis=1) - (share * saved).sum(axis=1)
    return np.ceil(rest - 1e-6).astype(np.int64)


def _lacks_company(
    loads: Float64Array, limit: Float64Array, counts: Int64Array, extra: Int64Array, num_shards: int
) -> BoolArray:
    """bool [B]: the hottest experts' replicas and what must lie beside them weigh more than their shards may."""
    num_problems, num_experts = loads.shape
    least_slots = int(counts[0].sum() + extra[0]) // num_shards
    spend = np.arange(int(np.clip(extra.max(initial=0), 0, MAX_SPEND)) + 1)
    if least_slots < 2:
        return np.zeros(num_problems, dtype=bool)
    problem = np.arange(num_problems)[:, None]
    hottest = np.argsort(-loads / counts, axis=1, kind="stable")[:, :MAX_HOTTEST]
    # Replicas of experts that have several weigh at least this, however many more they get.
    several = np.where(counts > 1, loads / (counts + np.maximum(extra, 0)[:, None]), np.inf).min(axis=1)
    singles = np.sort(np.where(counts > 1, np.inf, loads), axis=1)
    cheapest = np.minimum(singles, several[:, None])
    most_company = num_shards * (least_slots - 1)
    num_padding = max(most_company - num_experts, 0)
    padding = np.repeat(np.where(np.isfinite(several), several, 0.0)[:, None], num_padding, axis=1)
    cheapest = np.concatenate([np.where(np.isfinite(cheapest), cheapest, 0.0), padding], axis=1)
    company = np.concatenate([np.zeros((num_problems, 1)), np.cumsum(cheapest, axis=1)], axis=1)
    num_replicas = counts[problem, hottest][:, :, None] + spend
    left = extra[:, None, None] - spend
    beside = np.clip(num_replicas * (least_slots - 1) - 2 * left, 0, most_company)
    weight = loads[problem, hottest][:, :, None] + company[problem[:, :, None], beside]
    fits = (weight <= num_replicas * limit[:, None, None]) & (num_replicas <= num_shards) & (left >= 0)
    found: BoolArray = (~fits.any(axis=2)).any(axis=1) & (extra <= MAX_SPEND)
    return found

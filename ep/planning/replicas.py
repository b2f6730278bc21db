"""How many replicas each expert gets.

Shape legend: B problems (MoE layers, or their nodes), E logical experts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


def highest_averages(
    loads: Float64Array, num_redundant: int | Int64Array, most: int, start: Int64Array | None = None
) -> Int64Array:
    """Replicas of each expert, int64 [B, E]: the next one always goes to the expert with the most load per replica.

    loads: [B, E]. num_redundant: how many to give on top of `start` (one each by default), also per problem [B]. No
    expert gets more than `most`. This is the published EPLB's `replicate_experts` (github.com/deepseek-ai/EPLB, ties to
    the lower index); in apportionment it is D'Hondt's method, which minimises the largest load per replica.
    """
    num_problems = len(loads)
    counts = np.ones(loads.shape, dtype=np.int64) if start is None else start.copy()
    left = np.broadcast_to(np.asarray(num_redundant), (num_problems,))
    averages = np.where(counts < most, loads / counts, -1.0)
    rows = np.arange(num_problems)
    for given in range(int(left.max(initial=0))):
        rows = rows[left[rows] > given]
        expert = averages[rows].argmax(axis=1) if len(rows) < num_problems else averages.argmax(axis=1)
        counts[rows, expert] += 1
        count = counts[rows, expert]
        averages[rows, expert] = np.where(count < most, loads[rows, expert] / count, -1.0)
    return counts


def fewest(loads: Float64Array, limit: Float64Array) -> Int64Array:
    """The fewest replicas [B, E] that bring every expert's load per replica down to limit [B] (positive)."""
    # The slack keeps a load that is a multiple of the limit up to rounding from costing one more.
    return np.maximum(np.ceil(loads / limit[:, None] * (1 - 1e-12)), 1).astype(np.int64)


def just_enough(loads: Float64Array, limit: Float64Array, num_redundant: int, most: int) -> Int64Array:
    """Replicas [B, E]: the fewest for the hottest experts, and what is left to those with a single one.

    A hot expert's few large replicas take up few shards, which leaves room for experts of middling load;
    `highest_averages` makes more and smaller ones. Where `limit` [B] cannot be met, highest averages.
    """
    counts = np.minimum(fewest(loads, limit), most)
    left = num_redundant - (counts - 1).sum(axis=1)
    unmet = left < 0
    counts[unmet], left = 1, np.where(unmet, num_redundant, left)
    # Singles first; once all of them are replicated the rest goes wherever the average is highest.
    single = counts == 1
    to_singles = np.where(unmet, 0, np.minimum(left, single.sum(axis=1)))
    single_loads = np.where(single, loads, 0.0)
    counts = highest_averages(single_loads, to_singles, most, counts)
    return highest_averages(loads, left - to_singles, most, counts)

"""Parts of decode steps, whatever they were told apart by."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_STEPS = 3


@dataclass(frozen=True)
class StepParts:
    """Medians over num_steps decode steps of num_requests requests, milliseconds. period: from one step's start to the
    next one's, which the parts add up to: those of ep/bench/profile.py, on a GPU of profile_gpu.py."""

    num_steps: int
    num_requests: int
    period_ms: float
    parts_ms: dict[str, float]


def sum_up(rows: Sequence[dict[str, float]], num_requests: int) -> StepParts:
    """rows: microseconds of every step's parts, all of the same. Of the half of the steps around the median period, so
    that the parts still add up: medians of each part would not."""
    ordered = sorted(rows, key=lambda row: sum(row.values()))
    cut = len(ordered) // 4
    kept = ordered[cut : len(ordered) - cut]
    parts = {name: statistics.fmean(row[name] for row in kept) / 1e3 for name in rows[0]}
    return StepParts(len(rows), num_requests, sum(parts.values()), parts)


def join(routers: Sequence[StepParts]) -> StepParts:
    """Of routers that share a batch: their mean, and how many requests they have together."""
    return StepParts(
        min(one.num_steps for one in routers),
        sum(one.num_requests for one in routers),
        statistics.fmean(one.period_ms for one in routers),
        {name: statistics.fmean(one.parts_ms[name] for one in routers) for name in routers[0].parts_ms},
    )

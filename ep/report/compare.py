"""Two reports side by side. Pure.

Shape legend: L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from ep.errors import TraceError
from ep.planning.imbalance import imbalance
from ep.planning.plan import shard_load
from ep.report.numbers import ReportNumbers
from ep.report.plans import CURRENT, PLANNED
from ep.report.sheets import EVENNESS, EXCESS
from ep.report.units import count, micros, percent, seconds, size, times


@dataclass(frozen=True)
class Comparison:
    """metrics: by name, of the first and of the second trace; None where a trace has none.

    moved_share: share of a layer's pairs that went to other experts in the second trace than in the first (the total
    variation distance of the experts' shares), mean over layers. plan_of_a_on_b, plan_of_b_on_a: excess of the plan for
    one trace's load under the other's.
    """

    metrics: dict[str, tuple[float | None, float | None]]
    moved_share: float
    plan_of_a_on_b: float
    plan_of_b_on_a: float


@dataclass(frozen=True)
class Metric:
    """label, words: how it is shown."""

    label: str
    read: Callable[[ReportNumbers], float | None]
    words: Callable[[Any], str]


def _phase(name: str, field: str) -> Callable[[ReportNumbers], float]:
    return lambda numbers: next(getattr(phase, field) for phase in numbers.phases if phase.phase == name)


def _placement(name: str) -> Callable[[ReportNumbers], float]:
    return lambda numbers: next(found.excess for found in numbers.plans.placements if found.name == name)


def _slowest(field: str) -> Callable[[ReportNumbers], float | None]:
    def read(numbers: ReportNumbers) -> float | None:
        found = [getattr(shard, field) for shard in numbers.shards if getattr(shard, field) is not None]
        return max(found) if found else None

    return read


def _fine(share: float) -> str:
    return percent(share, 2)


METRICS = {
    "seconds": Metric("recorded", lambda numbers: numbers.trace.seconds, seconds),
    "prefill_tokens": Metric("prefill tokens", _phase("prefill", "tokens"), count),
    "decode_tokens": Metric("decode tokens", _phase("decode", "tokens"), count),
    "prefill_excess": Metric(f"prefill {EXCESS}", _phase("prefill", "excess"), percent),
    "decode_excess": Metric(f"decode {EXCESS}", _phase("decode", "excess"), percent),
    "excess": Metric(f"all {EXCESS}", _phase("all", "excess"), percent),
    "evenness": Metric(f"all {EVENNESS}", _phase("all", "evenness"), percent),
    "current_excess": Metric("current placement, all load", _placement(CURRENT), _fine),
    "planned_excess": Metric("plan", _placement(PLANNED), _fine),
    "bound_excess": Metric("bound", lambda numbers: numbers.plans.bounds.excess, _fine),
    "hottest_load": Metric("hottest expert, × mean", lambda numbers: numbers.hottest[0].load, times),
    "step_ms_p50": Metric(
        "step p50, median window",
        lambda numbers: median(point.step_ms_p50 for point in numbers.timeline),
        lambda value: f"{value:.1f} ms",
    ),
    "round_trip_us_p50": Metric("slowest shard's round trip p50", _slowest("round_trip_us_p50"), micros),
    "round_trip_us_p99": Metric("slowest shard's round trip p99", _slowest("round_trip_us_p99"), micros),
    "bytes": Metric(
        "bytes both ways", lambda numbers: float((numbers.links.bytes_out + numbers.links.bytes_in).sum()), size
    ),
    "between_nodes": Metric("of them between nodes", lambda numbers: numbers.links.between_nodes, percent),
}


def compare(one: ReportNumbers, other: ReportNumbers) -> Comparison:
    """Raises TraceError where the traces are of models with other layers or experts."""
    shapes = [(numbers.trace.num_moe_layers, numbers.trace.experts_per_layer) for numbers in (one, other)]
    if shapes[0] != shapes[1] or [row.layer for row in one.layers] != [row.layer for row in other.layers]:
        (layers, experts), (other_layers, other_experts) = shapes
        raise TraceError(
            f"{other.trace.name}: has {other_layers} MoE layers of {other_experts} experts, expected those of "
            f"{one.trace.name}: {layers} of {experts}"
        )
    moved = np.abs(expert_shares(one) - expert_shares(other)).sum(axis=1) / 2
    return Comparison(
        metrics={name: (metric.read(one), metric.read(other)) for name, metric in METRICS.items()},
        moved_share=float(moved.mean()),
        plan_of_a_on_b=_excess_of(one, other),
        plan_of_b_on_a=_excess_of(other, one),
    )


def expert_shares(numbers: ReportNumbers) -> npt.NDArray[np.float64]:
    """float64 [L, E], each expert's share of the pairs of its layer."""
    counts = numbers.counts
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _excess_of(planned: ReportNumbers, judged: ReportNumbers) -> float:
    return float(imbalance(shard_load(planned.plans.planned, judged.counts)).excess.mean())

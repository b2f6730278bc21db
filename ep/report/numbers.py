"""Everything that a report says, in numbers: from a trace, the same for the same trace. Pure.

Shape legend: L MoE layers, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ep.errors import TraceError
from ep.load import Int64Array, totals
from ep.report.experts import Coactivation, HotExpert, coactivation, hottest
from ep.report.plans import PlanNumbers, plan_numbers
from ep.report.served import (
    ChangeNumbers,
    LayerNumbers,
    LinkBytes,
    PhaseNumbers,
    ShardNumbers,
    TimelinePoint,
    changes,
    layers,
    link_bytes,
    phases,
    shards,
    timeline,
)
from ep.report.survival import SurvivalNumbers, survival_numbers
from ep.report.what_if import OnProgress, WhatIfNumbers, what_if_numbers
from ep.trace import Trace

FORMAT = 1
"""Of the JSON document: raised when a key changes its meaning or goes away."""
DIGITS = 6


@dataclass(frozen=True)
class ReportOptions:
    """top: hottest experts to list. seed: of what is sampled (losses of several shards, where there are too many)."""

    top: int = 20
    seed: int = 0


@dataclass(frozen=True)
class TraceNumbers:
    """What was recorded. name: of the trace's file. seconds: from the start of the first window to the end of the last.
    redundant_slots: of a layer of the current placement, beyond one for each expert."""

    name: str
    model: str
    created: str
    versions: dict[str, str]
    warnings: tuple[str, ...]
    num_windows: int
    num_steps: int
    seconds: float
    num_moe_layers: int
    experts_per_layer: int
    top_k: int
    num_shards: int
    nodes: tuple[str, ...]
    num_routers: int
    generation: int
    redundant_slots: int
    expert_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True, eq=False)
class ReportNumbers:
    """counts, prefill, decode: int64 [L, E], pairs of each logical expert over the whole trace. `layers` has the layer
    numbers of their rows. phases: prefill, decode, all."""

    trace: TraceNumbers
    phases: tuple[PhaseNumbers, ...]
    layers: tuple[LayerNumbers, ...]
    hottest: tuple[HotExpert, ...]
    shards: tuple[ShardNumbers, ...]
    timeline: tuple[TimelinePoint, ...]
    changes: tuple[ChangeNumbers, ...]
    links: LinkBytes
    coactivation: tuple[Coactivation, ...]
    plans: PlanNumbers
    what_if: tuple[WhatIfNumbers, ...]
    survivability: tuple[SurvivalNumbers, ...]
    prefill: Int64Array
    decode: Int64Array

    @property
    def counts(self) -> Int64Array:
        return self.prefill + self.decode


def report_numbers(trace: Trace, options: ReportOptions, on_progress: OnProgress | None = None) -> ReportNumbers:
    """Raises TraceError for a trace in which nothing was recorded."""
    header, spec = trace.header, trace.header.spec
    if not trace.windows:
        raise TraceError(f"{trace.source}: has no windows: nothing was recorded yet")
    prefill, decode = (totals(trace.windows, (spec.num_moe_layers, spec.num_experts), p) for p in ("prefill", "decode"))
    counts = prefill + decode
    if not counts.any():
        raise TraceError(f"{trace.source}: its {len(trace.windows)} windows hold no tokens")
    plans = plan_numbers(trace, counts)
    start = min(window.start for window in trace.windows)
    return ReportNumbers(
        trace=TraceNumbers(
            name=Path(trace.source).name,
            model=header.model,
            created=header.created,
            versions=header.versions,
            warnings=tuple(_nameless(warning, trace.source) for warning in trace.warnings),
            num_windows=len(trace.windows),
            num_steps=sum(window.num_steps for window in trace.windows),
            seconds=max(window.start + window.seconds for window in trace.windows) - start,
            num_moe_layers=spec.num_moe_layers,
            experts_per_layer=spec.num_experts,
            top_k=spec.top_k,
            num_shards=trace.current.num_shards,
            nodes=tuple(sorted({*header.node_of_shard, *header.node_of_router})),
            num_routers=len(header.node_of_router),
            generation=trace.current.generation,
            redundant_slots=plans.num_redundant,
            expert_bytes=spec.expert_bytes,
            kv_bytes_per_token=spec.kv_bytes_per_token,
        ),
        phases=phases(trace),
        layers=layers(trace, counts),
        hottest=hottest(trace, plans.planned, options.top),
        shards=shards(trace),
        timeline=timeline(trace),
        changes=changes(trace),
        links=link_bytes(trace),
        coactivation=coactivation(trace, counts),
        plans=plans,
        what_if=what_if_numbers(trace, counts, on_progress),
        survivability=survival_numbers(trace, counts, plans.planned, options.seed),
        prefill=prefill,
        decode=decode,
    )


def plain(value: Any) -> Any:
    """Numbers as JSON has them: dataclasses are objects of their fields, arrays lists; floats keep DIGITS digits, and
    what is no number is null."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value) if field.repr}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None
    return value


def _nameless(warning: str, source: str) -> str:
    """Without the path, which is no part of what was recorded."""
    return warning.removeprefix(f"{source}: ")

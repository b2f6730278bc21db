"""What stands where on the page of one report. Pure."""

from __future__ import annotations

from ep.report.expert_figures import coactivation, heatmap
from ep.report.html import Page, Section
from ep.report.numbers import ReportNumbers
from ep.report.shard_figures import links, shard_bars, timeline, what_if
from ep.report.sheets import (
    change_sheet,
    describe,
    headline,
    hot_sheet,
    phase_sheet,
    placement_sheet,
    shard_sheet,
    survival_sheet,
    what_if_sheet,
)
from ep.report.units import size


def report_page(numbers: ReportNumbers) -> Page:
    together = coactivation(numbers)
    sections = (
        Section("experts", "Experts", (heatmap(numbers), hot_sheet(numbers), *((together,) if together else ()))),
        Section("shards", "Shards", (phase_sheet(numbers), shard_bars(numbers), shard_sheet(numbers), links(numbers))),
        Section("time", "Over time", (timeline(numbers), change_sheet(numbers))),
        Section("placements", "Placements", (placement_sheet(numbers), survival_sheet(numbers))),
        Section("what-if", "What if", (what_if(numbers), what_if_sheet(numbers))),
    )
    return Page(
        title=f"Expert load: {numbers.trace.model}",
        subtitle=describe(numbers),
        cards=headline(numbers),
        sections=sections,
        facts=facts(numbers),
        warnings=numbers.trace.warnings,
    )


def facts(numbers: ReportNumbers) -> tuple[tuple[str, str], ...]:
    """Where the numbers come from."""
    trace = numbers.trace
    return (
        ("trace", f"{trace.name}, begun {trace.created}"),
        ("nodes", ", ".join(trace.nodes)),
        ("one expert", f"{size(trace.expert_bytes)} as the checkpoint stores it"),
        ("KV cache", f"{size(trace.kv_bytes_per_token)} a token in bf16, all layers"),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(trace.versions.items()))),
    )

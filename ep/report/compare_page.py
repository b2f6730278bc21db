"""Two reports side by side, as tables and as a page. Pure."""

from __future__ import annotations

import numpy as np

from ep.report.compare import METRICS, Comparison, expert_shares
from ep.report.experts import shards_of
from ep.report.figure import DECODE, LIFT, PREFILL, Figure
from ep.report.html import Page, Section
from ep.report.numbers import ReportNumbers, plain
from ep.report.pages import facts
from ep.report.sheets import EXCESS, describe
from ep.report.units import MISSING, listing, percent, times
from ep.sheet import Sheet

MOST_CHANGE = 3.0
"""Colours end at 8 times as much and an eighth."""


def compare_sheets(one: ReportNumbers, other: ReportNumbers, comparison: Comparison) -> tuple[Sheet, ...]:
    rows = [
        (metric.label, *(MISSING if value is None else metric.words(value) for value in values), _change(*values))
        for metric, values in zip(METRICS.values(), comparison.metrics.values(), strict=True)
    ]
    excess = (comparison.plan_of_b_on_a, comparison.plan_of_a_on_b)
    rows.append(("the other trace's plan on this load", *map(percent, excess), MISSING))
    names = _names(one, other)
    summary = Sheet(
        "Side by side",
        ("", *names, "change"),
        tuple(rows),
        f"{percent(comparison.moved_share)} of a layer's pairs went to other experts in the second trace.",
    )
    hot = Sheet(
        "Hottest experts of either",
        ("layer", "expert", *(f"× mean in {name}" for name in names), *(f"shards in {name}" for name in names)),
        tuple(_hot_rows(one, other)),
        "Shards that hold a replica in the current placement of each trace.",
        text_columns=2,
    )
    return summary, hot


def compare_page(one: ReportNumbers, other: ReportNumbers, comparison: Comparison) -> Page:
    names = _names(one, other)
    summary, hot = compare_sheets(one, other, comparison)
    phases = [{phase.phase: phase for phase in numbers.phases} for numbers in (one, other)]
    before, after = (percent(phase["all"].excess) for phase in phases)
    cards = (
        ("imbalance served", f"{before} → {after}", EXCESS),
        ("pairs on other experts", percent(comparison.moved_share), "mean over layers"),
        (f"plan of {names[0]}", percent(comparison.plan_of_a_on_b), f"on the load of {names[1]}"),
    )
    return Page(
        title=f"Expert load: {names[0]} and {names[1]}",
        subtitle="; ".join(f"{name}: {describe(numbers)}" for name, numbers in zip(names, (one, other), strict=True)),
        cards=cards,
        sections=(
            Section("summary", "Side by side", (summary, _timelines(one, other))),
            Section("experts", "Experts", (_shifts(one, other), hot)),
            Section("shards", "Shards", (_shards(one, other),)),
        ),
        facts=tuple(
            (f"{name}: {what}", value)
            for name, numbers in zip(names, (one, other), strict=True)
            for what, value in facts(numbers)
        ),
        warnings=(*one.trace.warnings, *other.trace.warnings),
    )


def _names(one: ReportNumbers, other: ReportNumbers) -> tuple[str, str]:
    """The files' names; A and B before them where they are the same."""
    names = (one.trace.name, other.trace.name)
    return names if names[0] != names[1] else (f"A {names[0]}", f"B {names[1]}")


def _change(one: float | None, other: float | None) -> str:
    if one is None or other is None or one == 0:
        return MISSING
    return f"{100 * (other / one - 1):+.1f}%"


def _hot_rows(one: ReportNumbers, other: ReportNumbers) -> list[tuple[str, ...]]:
    position = {layer.layer: layer_pos for layer_pos, layer in enumerate(one.layers)}
    found = {(expert.layer, expert.expert) for numbers in (one, other) for expert in numbers.hottest}
    num_experts = one.trace.experts_per_layer
    loads = [expert_shares(numbers) * num_experts for numbers in (one, other)]
    rows = []
    for layer, expert in sorted(found):
        cells = [load[position[layer], expert] for load in loads]
        shards = [shards_of(numbers.plans.current, position[layer], expert) for numbers in (one, other)]
        rows.append((max(cells), (str(layer), str(expert), *map(times, cells), *map(listing, shards))))
    return [row for _load, row in sorted(rows, key=lambda row: -row[0])]


def _timelines(one: ReportNumbers, other: ReportNumbers) -> Figure:
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": f"{phase}, {name}",
            "x": plain([point.start for point in numbers.timeline]),
            "y": plain([getattr(point, f"{phase}_excess") for point in numbers.timeline]),
            "line": {"color": color, "dash": dash},
            "hovertemplate": f"{phase}, {name}: %{{y:.1%}}<extra></extra>",
        }
        for name, numbers, dash in zip(_names(one, other), (one, other), ("solid", "dot"), strict=True)
        for phase, color in (("prefill", PREFILL), ("decode", DECODE))
    ]
    layout = {
        "height": 380,
        "xaxis": {"title": {"text": "seconds since the first window"}},
        "yaxis": {"title": {"text": EXCESS}, "tickformat": ".0%", "rangemode": "tozero"},
    }
    return Figure("timelines", "Imbalance over time", "Each trace from its own first window.", data, layout)


def _shifts(one: ReportNumbers, other: ReportNumbers) -> Figure:
    """Every expert, coloured by how its share of the layer changed."""
    shares = [expert_shares(numbers) for numbers in (one, other)]
    both = (shares[0] > 0) & (shares[1] > 0)
    ratio = np.divide(shares[1], shares[0], out=np.full(shares[0].shape, np.nan), where=both)
    with np.errstate(invalid="ignore"):
        power = np.clip(np.log2(ratio), -MOST_CHANGE, MOST_CHANGE)
    layers = [layer.layer for layer in one.layers]
    cells = {
        "type": "heatmap",
        "y": layers,
        "z": plain(power),
        "customdata": plain(np.dstack([100 * shares[0], 100 * shares[1]])),
        "zmin": -MOST_CHANGE,
        "zmax": MOST_CHANGE,
        "colorscale": [[0, LIFT[0][1]], [0.5, LIFT[1][1]], [0.75, LIFT[2][1]], [1, LIFT[3][1]]],
        "colorbar": {
            "title": {"text": "second / first"},
            "tickvals": [-3, -2, -1, 0, 1, 2, 3],
            "ticktext": ["≤ 1/8", "1/4", "1/2", "same", "2×", "4×", "≥ 8×"],
        },
        "hovertemplate": "layer %{y}, expert %{x}<br>"
        "%{customdata[0]:.2f}% of its layer, then %{customdata[1]:.2f}%<extra></extra>",
        "hoverongaps": False,
    }
    bare = {"showgrid": False, "zeroline": False}
    layout = {
        "height": max(320, min(900, 120 + 11 * len(layers))),
        "xaxis": {"title": {"text": "logical expert"}, "range": [-0.5, one.counts.shape[1] - 0.5], **bare},
        "yaxis": {"title": {"text": "layer"}, "range": [layers[-1] + 0.5, layers[0] - 0.5], **bare},
    }
    note = "Colour: the expert's share of its layer in the second trace over that in the first; blank where it is 0."
    return Figure("shifts", "Where load went", note, [cells], layout)


def _shards(one: ReportNumbers, other: ReportNumbers) -> Figure:
    data = [
        {
            "type": "bar",
            "name": name,
            "x": [str(shard.shard) for shard in numbers.shards],
            "y": plain([shard.load for shard in numbers.shards]),
            "marker": {"color": color},
            "hovertemplate": f"shard %{{x}}, {name}: %{{y:.3f}} × the mean<extra></extra>",
        }
        for name, numbers, color in zip(_names(one, other), (one, other), (PREFILL, DECODE), strict=True)
    ]
    layout = {
        "height": 360,
        "barmode": "group",
        "xaxis": {"title": {"text": "shard"}, "type": "category"},
        "yaxis": {"title": {"text": "load, × mean shard"}, "rangemode": "tozero"},
    }
    return Figure("both-shards", "Load per shard, as served", "Pairs over the mean shard's, all layers.", data, layout)

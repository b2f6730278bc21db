"""Plots of shards: their load, imbalance over time, links, and other numbers of them. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ep.report.figure import CURRENT, DECODE, PLANNED, PREFILL, SEQUENTIAL, Choice, Figure, dashed
from ep.report.numbers import ReportNumbers, plain
from ep.report.sheets import EVENNESS, EXCESS

Traces = list[dict[str, Any]]


def shard_bars(numbers: ReportNumbers) -> Figure:
    """Load per shard before and after: the current placement and the plan, on the load of the whole trace."""
    names = [f"{shard.shard}" for shard in numbers.shards]
    loads = {"current placement": numbers.plans.current_load, "plan": numbers.plans.planned_load}
    views = {"all layers": {name: load.sum(axis=0) for name, load in loads.items()}}
    for layer_pos, layer in enumerate(numbers.layers):
        views[f"layer {layer.layer}"] = {name: load[layer_pos] for name, load in loads.items()}
    shares = {label: {name: plain(_over_mean(load)) for name, load in view.items()} for label, view in views.items()}
    data: Traces = [
        {
            "type": "bar",
            "name": name,
            "x": names,
            "y": values,
            "marker": {"color": color},
            "hovertemplate": f"shard %{{x}}, {name}: %{{y:.3f}} × the mean<extra></extra>",
        }
        for (name, values), color in zip(shares["all layers"].items(), (CURRENT, PLANNED), strict=True)
    ]
    layout = {
        "height": 360,
        "barmode": "group",
        "xaxis": {"title": {"text": "shard"}, "type": "category"},
        "yaxis": {"title": {"text": "load, × mean shard"}, "rangemode": "tozero"},
        "shapes": [dashed(y0=1, y1=1, x0=0, x1=1, xref="paper", yref="y")],
    }
    choices = tuple(Choice(label, {"y": list(view.values())}, (0, 1)) for label, view in shares.items())
    note = "Pairs of each shard over the mean shard's, on the load of the whole trace; the line is an even split."
    return Figure("shards", "Load per shard, before and after the plan", note, data, layout, choices, "layer")


def timeline(numbers: ReportNumbers) -> Figure:
    """Imbalance over time, prefill and decode apart, with the changes of placement."""
    points = numbers.timeline
    start = [point.start for point in points]
    lines = (
        ("prefill", PREFILL, [point.prefill_excess for point in points], [point.prefill_tokens for point in points]),
        ("decode", DECODE, [point.decode_excess for point in points], [point.decode_tokens for point in points]),
    )
    data: Traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": plain(start),
            "y": plain(excess),
            "customdata": [[point.generation, count] for point, count in zip(points, tokens, strict=True)],
            "line": {"color": color},
            "marker": {"size": 5},
            "hovertemplate": f"{name} at %{{x:,.0f}} s: %{{y:.1%}}<br>"
            "%{customdata[1]:,} tokens, generation %{customdata[0]}<extra></extra>",
        }
        for name, color, excess, tokens in lines
    ]
    for name, dash, values in (
        ("step p50", "solid", [point.step_ms_p50 for point in points]),
        ("step p99", "dot", [point.step_ms_p99 for point in points]),
    ):
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": plain(start),
                "y": plain(values),
                "yaxis": "y2",
                "line": {"color": CURRENT, "dash": dash},
                "hovertemplate": f"{name} at %{{x:,.0f}} s: %{{y:.1f}} ms<extra></extra>",
            }
        )
    layout = {
        "height": 460,
        "xaxis": {"title": {"text": "seconds since the first window"}, "anchor": "y2"},
        "yaxis": {"title": {"text": EXCESS}, "tickformat": ".0%", "rangemode": "tozero", "domain": [0.38, 1]},
        "yaxis2": {"title": {"text": "step, ms"}, "rangemode": "tozero", "domain": [0, 0.28]},
        "shapes": [
            dashed(x0=change.start, x1=change.start, y0=0, y1=1, xref="x", yref="paper") for change in numbers.changes
        ],
        "annotations": [
            {
                "x": change.start,
                "y": 1,
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
                "text": f"generation {change.new_generation}",
            }
            for change in numbers.changes
        ],
    }
    note = "Each point is one window under the placement that it ran with; dashed lines are changes of placement."
    return Figure("timeline", "Imbalance and step time over time", note, data, plain(layout))


def links(numbers: ReportNumbers) -> Figure:
    """Bytes between the routers of each node and each shard."""
    found = numbers.links
    views = {"both ways": found.bytes_out + found.bytes_in, "to the shards": found.bytes_out, "back": found.bytes_in}
    shards = [[shard.node for shard in numbers.shards], [f"{shard.shard}" for shard in numbers.shards]]
    mib = {label: plain(matrix / 2**20) for label, matrix in views.items()}
    cells: dict[str, Any] = {
        "type": "heatmap",
        "x": shards,
        "y": list(found.router_nodes),
        "z": mib["both ways"],
        "colorscale": SEQUENTIAL,
        "colorbar": {"title": {"text": "MiB"}},
        "xgap": 2,
        "ygap": 2,
        "zmin": 0,
        "zmax": _most(mib["both ways"]),
        "hovertemplate": "routers on %{y}, shard %{x}<br>%{z:,.1f} MiB<extra></extra>",
    }
    layout = {
        "height": 200 + 40 * len(found.router_nodes),
        "xaxis": {"type": "multicategory", "title": {"text": "shard, by node"}, "showgrid": False},
        "yaxis": {"type": "category", "title": {"text": "routers' node"}, "showgrid": False},
    }
    note = f"Payload bytes over the whole trace; {100 * found.between_nodes:.1f}% of them went between nodes."
    choices = tuple(Choice(label, {"z": [matrix], "zmax": _most(matrix)}, (0,)) for label, matrix in mib.items())
    return Figure("links", "Bytes per link between nodes", note, [cells], layout, choices, "direction")


def what_if(numbers: ReportNumbers) -> Figure:
    """Evenness of the plans for other numbers of shards, over the redundant slots."""
    rows = numbers.what_if
    data: Traces = []
    sizes = sorted({row.num_shards for row in rows})
    for position, num_shards in enumerate(sizes):
        line = [row for row in rows if row.num_shards == num_shards]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": f"{num_shards} shards",
                "x": [row.num_redundant for row in line],
                "y": plain([row.evenness for row in line]),
                "line": {"color": _between(PREFILL, DECODE, position / max(len(sizes) - 1, 1))},
                "hovertemplate": f"{num_shards} shards, %{{x}} redundant: mean/max %{{y:.2%}}<extra></extra>",
            }
        )
    layout = {
        "height": 380,
        "xaxis": {
            "title": {"text": "redundant slots per layer"},
            "tickvals": sorted({row.num_redundant for row in rows}),
        },
        "yaxis": {"title": {"text": EVENNESS}, "tickformat": ".0%", "range": [0, 1.02]},
    }
    return Figure(
        "what-if",
        "What if: how even a plan is",
        "A plan for each, judged on the load of the whole trace; 100% is even.",
        data,
        layout,
    )


def _most(matrix: list[list[float]]) -> float:
    return max(max(row) for row in matrix)


def _over_mean(load: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return load / load.mean() if load.any() else load


def _between(one: str, other: str, share: float) -> str:
    """A colour on the straight line between two."""
    channels = [(int(one[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in channels)

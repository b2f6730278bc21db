"""Plots of experts: how hot each is, and which are chosen together. Pure.

Shape legend: L MoE layers, E logical experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ep.load import Int64Array
from ep.report.figure import HEAT, LIFT, Choice, Figure
from ep.report.numbers import ReportNumbers, plain

NUM_MARKED = 10
COLDEST = 1 / 16
MOST_LIFT = 4.0
"""Colours end there: colder is cold enough, and more lift than that comes from few tokens."""


def heatmap(numbers: ReportNumbers) -> Figure:
    """Every expert of every layer, coloured by its load over its layer's mean."""
    layers = [layer.layer for layer in numbers.layers]
    by_phase = {"all": numbers.counts, "prefill": numbers.prefill, "decode": numbers.decode}
    shown = {phase: _times_mean(counts) for phase, counts in by_phase.items() if counts.any()}
    high = max(float(np.nanmax(ratio)) for ratio in shown.values())
    top = max(np.ceil(np.log2(high)), 1.0)
    low = np.log2(COLDEST)
    ticks = [float(power) for power in range(int(low), int(top) + 1, 2)]
    updates = {
        phase: {
            "z": plain(np.log2(np.maximum(ratio, COLDEST))),
            "customdata": plain(np.stack([by_phase[phase].astype(np.float64), ratio], axis=2)),
        }
        for phase, ratio in shown.items()
    }
    first = next(iter(updates))
    hot = numbers.hottest[:NUM_MARKED]
    cells: dict[str, Any] = {
        "type": "heatmap",
        "y": layers,
        **updates[first],
        "zmin": low,
        "zmax": float(top),
        "colorscale": HEAT,
        "colorbar": {"title": {"text": "× mean"}, "tickvals": ticks, "ticktext": [_power(tick) for tick in ticks]},
        "hovertemplate": "layer %{y}, expert %{x}<br>"
        "%{customdata[0]:,} pairs, %{customdata[1]:.2f} × the mean<extra></extra>",
    }
    marks: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "x": [expert.expert for expert in hot],
        "y": [expert.layer for expert in hot],
        "marker": {"symbol": "circle-open", "size": 13, "color": "#111111", "line": {"width": 2}},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    bare = {"showgrid": False, "zeroline": False}
    layout = {
        "height": max(320, min(900, 120 + 11 * len(layers))),
        "xaxis": {"title": {"text": "logical expert"}, "range": [-0.5, numbers.counts.shape[1] - 0.5], **bare},
        "yaxis": {"title": {"text": "layer"}, "range": [layers[-1] + 0.5, layers[0] - 0.5], **bare},
    }
    note = (
        "Colour: pairs of the expert over its layer's mean expert, in powers of 2. "
        f"Rings: the {len(hot)} hottest of the trace."
    )
    choices = tuple(
        Choice(phase, {name: [value] for name, value in update.items()}, (0,)) for phase, update in updates.items()
    )
    return Figure("heatmap", "Load of every expert", note, [cells, marks], layout, choices, "phase")


def coactivation(numbers: ReportNumbers) -> Figure | None:
    """Which of a layer's hottest experts are chosen together; None where no tokens were sampled."""
    if not numbers.coactivation:
        return None
    updates = []
    for layer in numbers.coactivation:
        names = [f"e{expert}" for expert in layer.experts]
        updates.append(
            {
                "x": names,
                "y": names,
                "z": plain(np.minimum(layer.lift, MOST_LIFT)),
                "customdata": plain(np.dstack([layer.together, layer.lift])),
            }
        )
    cells: dict[str, Any] = {
        "type": "heatmap",
        **updates[0],
        "zmin": 0,
        "zmax": MOST_LIFT,
        "colorscale": LIFT,
        "colorbar": {"title": {"text": "lift"}, "tickvals": [0, 1, 2, 3, 4], "ticktext": ["0", "1", "2", "3", "≥ 4"]},
        "hovertemplate": "%{x} and %{y}<br>"
        "lift %{customdata[1]:.2f}, together in %{customdata[0]:,} tokens<extra></extra>",
        "hoverongaps": False,
    }
    layout = {
        "height": 520,
        "xaxis": {"type": "category", "showgrid": False, "title": {"text": "logical expert, hottest first"}},
        "yaxis": {"type": "category", "showgrid": False, "autorange": "reversed", "title": {"text": "logical expert"}},
    }
    choices = tuple(
        Choice(f"layer {layer.layer}", {name: [value] for name, value in update.items()}, (0,))
        for layer, update in zip(numbers.coactivation, updates, strict=True)
    )
    note = (
        f"Lift = P(both) / (P(one) × P(other)) over {numbers.coactivation[0].num_tokens:,} sampled tokens: 1 is "
        "chance, above it they are chosen together. Such experts on one shard save dispatches."
    )
    return Figure(
        "coactivation", "Experts chosen together, hottest of a layer", note, [cells], layout, choices, "layer"
    )


def _times_mean(counts: Int64Array) -> npt.NDArray[np.float64]:
    """[L, E], NaN for a layer without load."""
    mean = counts.mean(axis=1, keepdims=True)
    return np.divide(counts, mean, out=np.full(counts.shape, np.nan), where=mean > 0)


def _power(exponent: float) -> str:
    return f"{2**exponent:.0f}×" if exponent >= 0 else f"1/{2**-exponent:.0f}×"

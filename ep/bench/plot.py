"""A plot of a results page as SVG: the same figure gives the same bytes, whenever and wherever it is drawn."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

COLOURS = ("#2f6ea8", "#e8833a", "#2f9e77", "#8a5fb5", "#cc3f2b", "#8a8fb5", "#b59a2f")


@dataclass(frozen=True)
class Series:
    """One line, or one colour of the bars: y over x. low, high: a band around y (a line's) or error bars (bars')."""

    label: str
    x: tuple[float | str, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Figure:
    """kind: "lines"; "bars", the series' side by side; "stack", one upon the other, where series that are dashed are
    drawn as lines over the bars. x that are words, or any x of bars, are places in the order of the first series.
    key: unique within a page, part of the file's name. reference: a dashed horizontal line."""

    key: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    kind: str = "lines"
    log_x: bool = False
    reference: float | None = None


def draw(figure: Figure) -> str:
    """The SVG file's text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    style = {"svg.hashsalt": figure.key, "svg.fonttype": "none", "font.size": 10, "axes.axisbelow": True}
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=(7.2, 4.0), layout="constrained")
        axes = canvas.subplots()
        _fill(axes, figure)
        axes.set_title(figure.title, fontsize=11, loc="left")
        axes.set_xlabel(figure.x_label)
        axes.set_ylabel(figure.y_label)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, color="#d5d9de")
        if figure.reference is not None:
            axes.axhline(figure.reference, linewidth=1, linestyle="--", color="#8a8f98")
        if len(figure.series) > 1:
            axes.legend(frameon=False, fontsize=9)
        text = io.StringIO()
        FigureCanvasSVG(canvas).print_svg(text, metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _fill(axes: Any, figure: Figure) -> None:
    words = figure.kind != "lines" or any(isinstance(x, str) for series in figure.series for x in series.x)
    places = list(dict.fromkeys(x for series in figure.series for x in series.x))
    base = [0.0] * len(places)
    bars = [series for series in figure.series if figure.kind != "lines" and not series.dashed]
    for idx, series in enumerate(figure.series):
        colour = COLOURS[idx % len(COLOURS)]
        x: list[Any] = [places.index(value) for value in series.x] if words else list(series.x)
        if figure.kind == "stack" and series in bars:
            axes.bar(x, series.y, 0.6, [base[place] for place in x], label=series.label, color=colour)
            for place, height in zip(x, series.y, strict=True):
                base[place] += height
        elif series in bars:
            width = 0.8 / len(bars)
            at = [place + (bars.index(series) - (len(bars) - 1) / 2) * width for place in x]
            axes.bar(at, series.y, width, label=series.label, color=colour, yerr=_errors(series), ecolor="#5b6067")
        else:
            line = "--" if series.dashed else "-"
            axes.plot(x, series.y, line, marker="o", markersize=4, label=series.label, color=colour)
            if series.low:
                axes.fill_between(x, series.low, series.high, color=colour, alpha=0.15, linewidth=0)
    if words:
        axes.set_xticks(range(len(places)), [_name(place) for place in places])
    elif figure.log_x:
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [_name(place) for place in places], minor=False)


def _errors(series: Series) -> list[list[float]] | None:
    if not series.low:
        return None
    return [
        [y - low for y, low in zip(series.y, series.low, strict=True)],
        [high - y for y, high in zip(series.y, series.high, strict=True)],
    ]


def _name(place: float | str) -> str:
    return place if isinstance(place, str) else f"{place:,.10g}"

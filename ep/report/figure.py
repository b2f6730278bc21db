"""A plot as plotly.js takes it: plain data and layout, and a menu of what else it can show. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PREFILL, DECODE, CURRENT, PLANNED = "#3b82c4", "#e8833a", "#8a8fb5", "#2f9e77"
HEAT = [[0, "#e3e9ef"], [0.4, "#c5d3df"], [0.65, "#f2a65a"], [0.85, "#cc3f2b"], [1, "#7a1020"]]
LIFT = [[0, "#2f6ea8"], [0.25, "#e9ecef"], [0.5, "#f2a65a"], [1, "#a81f2b"]]
SEQUENTIAL = [[0, "#eef3f6"], [0.5, "#5b9bc8"], [1, "#173f5f"]]


@dataclass(frozen=True)
class Choice:
    """An entry of the menu over a figure: what it changes in which of the figure's traces."""

    label: str
    update: dict[str, Any]
    traces: tuple[int, ...]


@dataclass(frozen=True)
class Figure:
    """key: its id on the page. choices: of a menu called `menu`, the first is what `data` shows."""

    key: str
    title: str
    note: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    choices: tuple[Choice, ...] = ()
    menu: str = ""


def dashed(**where: Any) -> dict[str, Any]:
    """A shape: a dashed line between two points."""
    return {"type": "line", "line": {"color": "#8a8f98", "width": 1, "dash": "dash"}, **where}

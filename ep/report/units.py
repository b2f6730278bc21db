"""Numbers as people read them; the JSON has them in full."""

from __future__ import annotations

from collections.abc import Sequence

MISSING = "-"


def count(value: float) -> str:
    """12,345, then three digits: 1.20 M, 345 M, 4.56 G."""
    for limit, unit in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:#.3g} {unit}".replace(". ", " ")
    return f"{value:,.0f}"


def size(num_bytes: float) -> str:
    """Bytes with a binary unit."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def percent(share: float | None, digits: int = 1) -> str:
    return MISSING if share is None else f"{100 * share:.{digits}f}%"


def times(ratio: float) -> str:
    return f"{ratio:.1f}×" if ratio < 100 else f"{ratio:.0f}×"


def micros(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f} µs"


def seconds(value: float) -> str:
    """0.32 s, 47 s, 3 min 20 s, 2 h 5 min."""
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def listing(values: Sequence[int], most: int = 4) -> str:
    """The first few, and how many more there are: 0, 1, 4, 7 +2."""
    shown = ", ".join(map(str, values[:most])) or MISSING
    return shown if len(values) <= most else f"{shown} +{len(values) - most}"


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")

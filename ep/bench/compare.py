"""`ep bench compare`: two results of one benchmark, figure by figure."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ep.bench.figures import BASELINE, HIGHER, Figure, figures
from ep.bench.result import finite
from ep.errors import OptionError
from ep.sheet import Sheet, show_sheets

BETTER, WORSE, SAME = "better", "WORSE", ""
MOST_ROWS = 40
_MACHINE = ("cpu", "cores", "memory_gib", "kernel", "python", "gpus")
_ELSEWHERE = ("output", "page")


@dataclass(frozen=True)
class Change:
    """ratio: after / before, 1 where both are 0. low, high: the same of the quartiles of the rounds that are furthest
    apart, where both results have rounds, else the ratio. verdict: BETTER or WORSE beyond the tolerance; a baseline's
    is always SAME."""

    name: str
    before: float
    after: float
    better: str
    ratio: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """differences: of the conditions and options, in words. only_before, only_after: names of figures of one result."""

    bench: str
    tolerance: float
    changes: tuple[Change, ...]
    differences: tuple[str, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]

    @property
    def regressions(self) -> tuple[str, ...]:
        """Names of the figures that are worse beyond the tolerance."""
        return tuple(change.name for change in self.changes if change.verdict == WORSE)


def run(before: str, after: str, tolerance: float, only: str | None, as_json: bool, console: Console) -> int:
    """The exit code: 1 on a regression. only: leaves out figures whose names lack it. Raises OptionError."""
    found = compare(read_result(before), read_result(after), tolerance, (before, after), only)
    if as_json:
        print(json.dumps(finite(asdict(found) | {"regressions": found.regressions}), allow_nan=False))
    else:
        _show(found, console)
    return 1 if found.regressions else 0


def read_result(path: str) -> dict[str, Any]:
    """A benchmark's JSON, from `--output` or as the last line of what it printed. Raises OptionError."""
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    for candidate in (text, text[text.rfind("\n") + 1 :]):
        try:
            found = json.loads(candidate)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    raise OptionError(f"{path}: holds no JSON of ep bench")


def compare(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    tolerance: float,
    sources: tuple[str, str] = ("the first", "the second"),
    only: str | None = None,
) -> Comparison:
    """Figures that both results have. Raises OptionError where they are not of one benchmark or share no figure."""
    first, second = (
        {one.name: one for one in figures(result, source) if only is None or only in one.name}
        for result, source in zip((before, after), sources, strict=True)
    )
    if before["bench"] != after["bench"]:
        raise OptionError(
            f"{sources[0]} is of ep bench {before['bench']}, {sources[1]} of ep bench {after['bench']}, expected one"
        )
    if not first.keys() & second.keys():
        named = f"--only {only}: " if only is not None else ""
        raise OptionError(f"{named}{sources[0]} and {sources[1]} have no figure in common")
    return Comparison(
        str(before["bench"]),
        tolerance,
        tuple(_change(one, second[name], tolerance) for name, one in first.items() if name in second),
        tuple(_differences(before, after)),
        tuple(name for name in first if name not in second),
        tuple(name for name in second if name not in first),
    )


def _change(before: Figure, after: Figure, tolerance: float) -> Change:
    low = high = ratio = _ratio(before.value, after.value)
    if before.rounds and after.rounds:
        (low_before, high_before), (low_after, high_after) = _quartiles(before.rounds), _quartiles(after.rounds)
        low, high = _ratio(high_before, low_after), _ratio(low_before, high_after)
    verdict = SAME
    if before.better != BASELINE:
        if _worse(before.value, after.value, before.better, tolerance):
            verdict = WORSE
        elif _worse(after.value, before.value, before.better, tolerance):
            verdict = BETTER
    return Change(before.name, before.value, after.value, before.better, ratio, low, high, verdict)


def _worse(before: float, after: float, better: str, tolerance: float) -> bool:
    return after < before * (1 - tolerance) if better == HIGHER else after > before * (1 + tolerance)


def _ratio(before: float, after: float) -> float:
    if before == after:
        return 1.0
    return after / before if before else math.inf


def _quartiles(rounds: Sequence[float]) -> tuple[float, float]:
    if len(rounds) == 1:
        return rounds[0], rounds[0]
    low, _, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return low, high


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    one, other = before.get("conditions", {}), after.get("conditions", {})
    machines = ({key: at.get(key) or None for key in _MACHINE} for at in (one, other))
    yield from _unlike("", *machines)
    yield from _unlike("", one.get("versions", {}), other.get("versions", {}))
    yield from _unlike("option ", before.get("options", {}), after.get("options", {}))


def _unlike(what: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for key in [*before, *(key for key in after if key not in before)]:
        one, other = before.get(key), after.get(key)
        if one != other and key not in _ELSEWHERE:
            yield f"{what}{key}: {json.dumps(one)} -> {json.dumps(other)}"


def _show(found: Comparison, console: Console) -> None:
    for difference in found.differences:
        console.print(f"not the same: {difference}", style="yellow", markup=False)
    rows = found.changes
    if len(rows) > MOST_ROWS:
        rows = tuple(change for change in rows if change.verdict != SAME)
    sheet = Sheet(
        f"ep bench {found.bench}: after / before",
        ("", "before", "after", "ratio", "spread", "better is", f"beyond {found.tolerance:.0%}"),
        tuple(_row(change) for change in rows),
        spare=(5,),
    )
    if rows:
        show_sheets((sheet,), console)
    left_out = len(found.changes) - len(rows)
    if left_out:
        console.print(f"{left_out} figures within the tolerance or of baselines are left out; --json has them")
    for names, where in ((found.only_before, "first"), (found.only_after, "second")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            console.print(f"only in the {where}: {names[0]}{more}", markup=False)
    worse, better = (sum(change.verdict == v for change in found.changes) for v in (WORSE, BETTER))
    console.print(f"{worse} of {len(found.changes)} figures worse and {better} better beyond {found.tolerance:.0%}")


def _row(change: Change) -> tuple[str, ...]:
    spread = "" if change.low == change.high else f"{change.low:.2f} to {change.high:.2f}"
    return (
        change.name,
        _number(change.before),
        _number(change.after),
        f"{change.ratio:.3f}",
        spread,
        change.better,
        change.verdict,
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

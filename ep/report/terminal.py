"""A report on the terminal."""

from __future__ import annotations

from rich.console import Console

from ep.report.numbers import ReportNumbers
from ep.report.sheets import (
    change_sheet,
    describe,
    headline,
    hot_sheet,
    phase_sheet,
    placement_sheet,
    shard_sheet,
)
from ep.sheet import show_sheets


def show(numbers: ReportNumbers, console: Console) -> None:
    """Prints the summary: the page has more, the JSON everything."""
    console.print(f"[bold]{numbers.trace.model}[/bold]  {describe(numbers)}")
    for what, figure, where in headline(numbers):
        console.print(f"  {what:18} [bold]{figure}[/bold]  {where}")
    show_sheets((phase_sheet(numbers), placement_sheet(numbers), hot_sheet(numbers), shard_sheet(numbers)), console)
    if numbers.changes:
        show_sheets((change_sheet(numbers),), console)

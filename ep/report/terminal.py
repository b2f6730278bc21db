"""A report on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from ep.report.numbers import ReportNumbers
from ep.report.sheets import (
    Sheet,
    change_sheet,
    describe,
    headline,
    hot_sheet,
    phase_sheet,
    placement_sheet,
    shard_sheet,
)

NARROW = 110


def show(numbers: ReportNumbers, console: Console) -> None:
    """Prints the summary: the page has more, the JSON everything."""
    console.print(f"[bold]{numbers.trace.model}[/bold]  {describe(numbers)}")
    for what, figure, where in headline(numbers):
        console.print(f"  {what:18} [bold]{figure}[/bold]  {where}")
    show_sheets((phase_sheet(numbers), placement_sheet(numbers), hot_sheet(numbers), shard_sheet(numbers)), console)
    if numbers.changes:
        show_sheets((change_sheet(numbers),), console)


def show_sheets(sheets: tuple[Sheet, ...], console: Console) -> None:
    narrow = console.width < NARROW
    for sheet in sheets:
        kept = [column for column in range(len(sheet.columns)) if not (narrow and column in sheet.spare)]
        table = Table(
            title=sheet.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
        )
        for column in kept:
            words = column < sheet.text_columns
            heading = sheet.columns[column]
            if narrow:
                heading = heading.replace(")/", ") /")  # where it may break
            table.add_column(heading, justify="left" if words else "right", no_wrap=not column, overflow="fold")
        for row in sheet.rows:
            table.add_row(*(row[column] for column in kept))
        console.print(table)

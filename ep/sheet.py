"""A table as text: for a terminal of any width, and as GitHub's Markdown."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

NARROW = 110


@dataclass(frozen=True)
class Sheet:
    """A table as text. text_columns: how many columns from the left hold words; the others are figures. spare: columns
    that a narrow terminal leaves out."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text_columns: int = 1
    spare: tuple[int, ...] = ()


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


def sheet_markdown(sheet: Sheet) -> str:
    """The table alone, without title and note."""
    lines = [_line(sheet.columns)]
    lines.append("|" + "|".join("---" if i < sheet.text_columns else "---:" for i in range(len(sheet.columns))) + "|")
    return "\n".join(lines + [_line(row) for row in sheet.rows])


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.strip().replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

"""How a benchmark ends: tables on the terminal, a page where one is asked for, and one line of JSON last."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ep.bench.page import Page, Report, command_line, write
from ep.sheet import show_sheets


def publish(bench: str, result: Any, report: Report, console: Console) -> None:
    """result: a dataclass with `conditions` and with `options`, whose `output` is the JSON's file and whose `page` is
    the folder of pages, each None for none. Raises OptionError."""
    show_sheets(report.sheets, console)
    for sheet in report.sheets:
        if sheet.note:
            console.print(sheet.note, style="dim", markup=False)
    try:
        if result.options.page is not None:
            page = Page(bench, command_line(sys.argv[1:]), result.conditions, report)
            path = write(page, result.options.page)
            console.print(f"page: {path}", markup=False, soft_wrap=True)
    finally:  # a folder that cannot be written does not cost the measurement
        print_json(bench, result, result.options.output)


def print_json(bench: str, result: Any, output: str | None) -> None:
    """result: a dataclass, whose options are printed without where its results go. output: None for no file."""
    found = {"bench": bench, **asdict(result)}
    for name in ("output", "page"):
        found["options"].pop(name, None)
    found = finite(found)
    if output:
        Path(output).write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(json.dumps(found, allow_nan=False), flush=True)


def finite(value: Any) -> Any:
    """JSON has no word for infinity: it is "inf" there."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)

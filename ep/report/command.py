"""`ep report`: a trace, or two side by side, on the terminal, as a page and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ep.errors import OptionError
from ep.report.compare import compare
from ep.report.compare_page import compare_page, compare_sheets
from ep.report.html import Page, render
from ep.report.numbers import FORMAT, ReportNumbers, ReportOptions, plain, report_numbers
from ep.report.pages import report_page
from ep.report.terminal import show
from ep.sheet import show_sheets
from ep.trace import Trace
from ep.trace_parts import read_all_parts


@dataclass(frozen=True)
class ReportOutput:
    """as_json: one document on stdout instead of tables. html: where the page goes; None is beside the trace. page:
    whether there is one; with as_json only where html names it."""

    as_json: bool = False
    html: str | None = None
    page: bool = True


def report(trace: Trace, options: ReportOptions, output: ReportOutput) -> None:
    """Raises TraceError for a trace in which nothing was recorded, OptionError where the page cannot be written."""
    numbers = _numbers(trace, options)
    written = _now()
    if output.as_json:
        _print_json(plain(numbers), written)
    else:
        show(numbers, _console())
    _write_page(lambda: report_page(numbers), output, _beside(trace.source), written)


def report_file(path: str, options: ReportOptions, output: ReportOutput) -> None:
    """As `report`, of the trace in a file. Raises TraceError."""
    report(read_all_parts(path), options, output)


def compare_files(paths: tuple[str, str], options: ReportOptions, output: ReportOutput) -> None:
    """Two traces side by side. Raises TraceError, OptionError."""
    one, other = (_numbers(read_all_parts(path), options) for path in paths)
    comparison = compare(one, other)
    written = _now()
    if output.as_json:
        _print_json({"comparison": plain(comparison), "a": plain(one), "b": plain(other)}, written)
    else:
        show_sheets(compare_sheets(one, other, comparison), _console())
    first, second = (_beside(path) for path in paths)
    beside = first.with_name(f"{first.stem}-{second.stem}.html")
    _write_page(lambda: compare_page(one, other, comparison), output, beside, written)


def _numbers(trace: Trace, options: ReportOptions) -> ReportNumbers:
    columns = (TextColumn("planning"), BarColumn(bar_width=30), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("planning", total=None)
        return report_numbers(trace, options, lambda done, total: bar.update(task, completed=done, total=total))


def _console() -> Console:
    """stdout; wide enough for every table where it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=140)


def _print_json(document: dict[str, Any], written: str) -> None:
    print(json.dumps({"format": FORMAT, "written": written, **document}, indent=1, allow_nan=False), flush=True)


def _write_page(make: Callable[[], Page], output: ReportOutput, beside: Path, written: str) -> None:
    if not output.page or (output.as_json and output.html is None):
        return
    path = Path(output.html) if output.html is not None else beside
    try:
        path.write_text(render(make(), written), encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror}; --html names another place, --no-html writes none") from error
    Console(stderr=True, highlight=False).print(f"page: {path}", soft_wrap=True)


def _beside(source: str) -> Path:
    return Path(source).with_suffix(".html")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

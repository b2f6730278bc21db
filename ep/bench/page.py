"""A dated results page as GitHub's Markdown: what was run and where, its tables, its plots as SVG files beside it."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ep.bench.conditions import Conditions
from ep.bench.plot import Figure, draw
from ep.errors import OptionError
from ep.sheet import Sheet, sheet_markdown

_OF_THIS_RUN = ("--output", "--page")
"""Options of the command line that say where results go, not what was measured."""


@dataclass(frozen=True)
class Report:
    """What a result says, for the terminal and for a page. title: of the page. summary: a paragraph under it. notes:
    paragraphs at the end."""

    title: str
    sheets: tuple[Sheet, ...]
    figures: tuple[Figure, ...] = ()
    summary: str = ""
    notes: tuple[str, ...] = ()


def incomplete(report: Report, why: str | None) -> Report:
    """The report of what was not measured to its end, which its summary and its first table say; as it is for None."""
    if why is None:
        return report
    first, *others = report.sheets
    marked = replace(first, note=f"INCOMPLETE: {why}. {first.note}".strip())
    return replace(report, sheets=(marked, *others), summary=f"**Incomplete**: {why}.\n\n{report.summary}".strip())


@dataclass(frozen=True)
class Page:
    """name: of the file, after the date. command: that gave the result."""

    name: str
    command: str
    conditions: Conditions
    report: Report


def command_line(arguments: Sequence[str]) -> str:
    """The `ep` command of these arguments without those that only say where its results go."""
    kept, rest = ["ep"], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            kept += [argument, *rest]
            break
        if argument in _OF_THIS_RUN:
            del rest[:1]
        elif not argument.startswith(tuple(f"{name}=" for name in _OF_THIS_RUN)):
            kept.append(argument)
    return shlex.join(kept)


def render(page: Page, stem: str) -> str:
    """The page's Markdown; its plots are files called STEM-KEY.svg beside it."""
    report = page.report
    parts = [f"# {report.title}, {page.conditions.date[:10]}"]
    parts += [report.summary] if report.summary else []
    parts.append(f"```bash\n{page.command}\n```")
    for sheet in report.sheets:
        parts += [f"**{sheet.title}**", sheet_markdown(sheet)]
        parts += [sheet.note] if sheet.note else []
    parts += [f"![{figure.title}]({_svg(stem, figure)})" for figure in report.figures]
    parts.append(f"Conditions: {_conditions(page.conditions)}")
    return "\n\n".join([*parts, *report.notes]) + "\n"


def write(page: Page, folder: str | Path) -> Path:
    """Writes FOLDER/YYYY-MM-DD-NAME.md and its plots; -2, -3 follow the name where such a page is there already.

    Raises OptionError where that is no folder, or cannot become one."""
    folder = Path(folder)
    stem = f"{page.conditions.date[:10]}-{re.sub(r'[^A-Za-z0-9._-]+', '-', page.name)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = _new_file(folder, stem)
        for figure in page.report.figures:
            (folder / _svg(path.stem, figure)).write_text(draw(figure), encoding="utf-8")
        path.write_text(render(page, path.stem), encoding="utf-8")
    except OSError as error:
        raise OptionError(f"--page {folder}: {error.strerror or error}") from error
    return path


def _new_file(folder: Path, stem: str) -> Path:
    number = 1
    while True:
        path = folder / (f"{stem}.md" if number == 1 else f"{stem}-{number}.md")
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return path


def _svg(stem: str, figure: Figure) -> str:
    return f"{stem}-{figure.key}.svg"


def _conditions(at: Conditions) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in at.versions.items())
    commit = f", commit {at.git}" if at.git else ""
    gpus = "".join(f"{count} x {name}, " for name, count in Counter(at.gpus).items())
    return (
        f"{gpus}{at.cores} cores of {at.cpu}, {at.memory_gib} GiB, Linux {at.kernel}, load {at.load_1m:g} before the "
        f"run; Python {at.python}, {versions}{commit}."
    )

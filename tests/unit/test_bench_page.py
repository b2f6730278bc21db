"""Results pages: what Markdown says of the tables, SVG that is the same each time, files that are never overwritten."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from ep.bench.conditions import Conditions, conditions
from ep.bench.page import Page, Report, command_line, render, write
from ep.bench.plot import Figure, Series, draw
from ep.bench.result import publish
from ep.errors import OptionError
from ep.sheet import Sheet, sheet_markdown

AT = replace(conditions(), date="2026-11-23T10:00:00+00:00")
BARS = (Series("a", ("x", "y"), (3, 2), (2, 1), (4, 3)), Series("b", ("y",), (1,)))
STACK = (
    Series("a", (512, 1024), (3, 2)),
    Series("b", (512, 1024), (1, 4)),
    Series("c", (512, 1024), (4, 6), dashed=True),
)
FIGURES = (
    Figure("lines", "Lines", "tokens", "ms", (Series("a", (1, 2, 4), (3, 2, 5), (2, 1, 4), (4, 3, 6)),), log_x=True),
    Figure("bars", "Bars", "", "tokens/s", BARS, "bars", reference=1.0),
    Figure("stack", "Stack", "input", "ms", STACK, "stack"),
)
SHEET = Sheet("A table", ("way", "µs"), (("shm", "1.5"), ("tcp", "2.5")), "µs: a median.")
REPORT = Report("Something", (SHEET,), FIGURES, "In short.", ("What it does not say.",))
CELL = st.text("abcXYZ019 ,.%|", max_size=8).map(str.strip)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.tuples(*[CELL] * n), min_size=1, max_size=4)))
def test_another_markdown_parser_finds_the_same_cells(rows: list[tuple[str, ...]]) -> None:
    columns = tuple(f"c{i}" for i in range(len(rows[0])))
    html = MarkdownIt().enable("table").render(sheet_markdown(Sheet("", columns, tuple(rows))))
    body = ElementTree.fromstring(html).find("tbody")
    assert body is not None
    assert [tuple("".join(cell.itertext()) for cell in row) for row in body] == rows


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.kind)
def test_a_plot_is_an_svg_with_its_words_and_the_same_bytes_each_time(figure: Figure) -> None:
    first = draw(figure)
    assert first == draw(figure) and str(2026) not in first
    root = ElementTree.fromstring(first)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = {"".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {figure.title, figure.y_label} <= words
    assert len(figure.series) == 1 or {series.label for series in figure.series} <= words


def test_a_page_links_the_plots_that_lie_beside_it_and_is_never_overwritten(tmp_path: Path) -> None:
    page = Page("what", "ep bench what", AT, REPORT)
    first, second = write(page, tmp_path / "new" / "folder"), write(page, tmp_path / "new" / "folder")
    assert (first.name, second.name) == ("2026-11-23-what.md", "2026-11-23-what-2.md")
    for path in (first, second):
        text = path.read_text()
        assert text == render(page, path.stem)
        for figure in FIGURES:
            name = f"{path.stem}-{figure.key}.svg"
            assert f"]({name})" in text and (path.parent / name).read_text() == draw(figure)
    for part in ("# Something, 2026-11-23", "In short.", "ep bench what", "µs: a median.", AT.cpu):
        assert part in first.read_text()


@dataclass(frozen=True)
class _Options:
    output: str | None
    page: str | None


@dataclass(frozen=True)
class _Result:
    conditions: Conditions
    options: _Options
    figure: float


def test_a_page_that_cannot_be_written_does_not_cost_the_measurement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    result = _Result(AT, _Options(str(tmp_path / "out.json"), str(tmp_path / "file")), 1.5)
    with pytest.raises(OptionError, match=r"--page .*file"):
        publish("what", result, REPORT, Console(stderr=True))
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads((tmp_path / "out.json").read_text())
    assert (last["bench"], last["figure"]) == ("what", 1.5)


WORD = st.text("ab1=-/ ", min_size=1, max_size=6).filter(lambda word: not word.startswith("--"))


@settings(max_examples=50)
@given(st.lists(WORD, max_size=4), st.lists(WORD, max_size=3), st.sampled_from(["--output", "--page"]), WORD)
def test_the_command_on_a_page_is_the_one_that_was_given(
    before: list[str], after: list[str], name: str, value: str
) -> None:
    for where_it_goes in ([name, value], [f"{name}={value}"]):
        line = command_line([*before, *where_it_goes, *after, "--", *where_it_goes])
        assert shlex.split(line) == ["ep", *before, *after, "--", *where_it_goes]

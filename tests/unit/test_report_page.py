"""The page in a browser: every plot is drawn, menus work, nothing is asked of the network, the console stays empty."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from ep.report.compare import compare
from ep.report.compare_page import compare_page
from ep.report.figure import Figure
from ep.report.html import Page, Section, render
from ep.report.numbers import ReportOptions, report_numbers
from ep.report.pages import report_page
from ep.sheet import Sheet
from tests.traces import SMALL, TraceCase, make_trace

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=20000",
    "--window-size=1280,2000",
)
CHANGE_MENUS = """<script>
let changed = 0;
for (const menu of document.querySelectorAll("[data-menu]")) {
  const plot = document.getElementById("plot-" + menu.dataset.menu);
  const before = JSON.stringify(plot.data);
  menu.selectedIndex = menu.options.length - 1;
  menu.dispatchEvent(new Event("change"));
  if (JSON.stringify(plot.data) !== before) changed += 1;
}
document.title = `${changed} menus`;
</script>"""

needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} on PATH")


def opened(html: str, folder: Path) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what they said on the console."""
    assert BROWSER is not None
    page = folder / "page.html"
    page.write_text(html, encoding="utf-8")
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@cache
def pages() -> dict[str, Page]:
    small = report_numbers(make_trace(SMALL), ReportOptions())
    other = report_numbers(
        make_trace(TraceCase(synthetic=True, seed=1, num_windows=3, change_at=None)), ReportOptions()
    )
    mixtral = report_numbers(
        make_trace(TraceCase("mixtral-8x7b", True, num_shards=1, num_windows=2, change_at=None, num_samples=0)),
        ReportOptions(),
    )
    return {
        "report": report_page(small),
        "one shard": report_page(mixtral),
        "comparison": compare_page(small, other, compare(small, other)),
    }


@needs_browser
@pytest.mark.parametrize("name", ["report", "one shard", "comparison"])
def test_every_plot_is_drawn_and_the_console_stays_empty(name: str, tmp_path: Path) -> None:
    page = pages()[name]
    figures = [block for section in page.sections for block in section.blocks if isinstance(block, Figure)]
    assert len(figures) >= 3
    document, console = opened(render(page, "now").replace("</body>", f"{CHANGE_MENUS}</body>"), tmp_path)
    assert console == []
    for figure in figures:
        drawn = document.split(f'id="plot-{figure.key}"')[1].split('type="application/json"')[0]
        assert 'class="main-svg"' in drawn
        marks = {"heatmap": "<image", "bar": 'class="point"', "scatter": 'class="js-line"'}
        assert all(marks[trace["type"]] in drawn or trace.get("mode") == "markers" for trace in figure.data)
    menus = sum(figure.choices[-1].update != figure.choices[0].update for figure in figures if figure.choices)
    assert f"<title>{menus} menus</title>" in document


@needs_browser
def test_the_console_would_be_heard_and_the_network_is_closed(tmp_path: Path) -> None:
    """What the test above would see if something went wrong."""
    script = "<script>fetch('http://127.0.0.1:9/'); null.x</script>"
    page = Page("t", "s", (), (Section("a", "A", (Sheet("x", ("y",), (("z",),)),)),), ())
    _document, console = opened(render(page, "now").replace("</body>", f"{script}</body>"), tmp_path)
    assert any("Content Security Policy" in line for line in console)
    assert any("TypeError" in line for line in console)


def test_text_from_a_trace_is_text() -> None:
    evil = "</script><script>alert(1)</script>"
    figure = Figure("f", evil, evil, [{"type": "bar", "name": evil, "x": [1], "y": [1]}], {})
    sheet = Sheet(evil, (evil,), ((evil,),), evil)
    html = render(
        Page(evil, evil, ((evil, evil, evil),), (Section("a", evil, (figure, sheet)),), ((evil, evil),)), evil
    )
    assert evil not in html and "alert(1)" in html


def test_plots_are_valid_for_plotly() -> None:
    """plotly's own schema knows every property; a misspelt one would be ignored without a word in the browser."""
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for page in pages().values():
        for section in page.sections:
            for figure in section.blocks:
                if isinstance(figure, Figure):
                    made = graph_objects.Figure({"data": figure.data, "layout": figure.layout})
                    for choice in figure.choices:
                        for key, values in choice.update.items():
                            for trace_idx, value in zip(
                                choice.traces, values if isinstance(values, list) else [values]
                            ):
                                made.data[trace_idx][key] = value


def test_only_data_urls_and_no_other_file() -> None:
    """Outside plotly.js, which has addresses in texts, nothing on the page points anywhere."""
    page = re.sub(r"<script>.*?</script>", "", render(pages()["report"], "now"), flags=re.DOTALL)
    assert not re.findall(r"(?:src|href)=\"(?!#)", page) and "http" not in page.replace("http-equiv", "")

"""A page: one HTML file with everything in it, plots included, that asks the network for nothing. Pure but for reading
its own style, script and plotly.js."""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from importlib import resources

from ep.report.figure import Figure
from ep.sheet import Sheet

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


@dataclass(frozen=True)
class Section:
    """key: its anchor. blocks: tables and plots in order."""

    key: str
    title: str
    blocks: tuple[Sheet | Figure, ...]


@dataclass(frozen=True)
class Page:
    """cards: (what, figure, where), the few figures on top. facts: (name, value), at the end."""

    title: str
    subtitle: str
    cards: tuple[tuple[str, str, str], ...]
    sections: tuple[Section, ...]
    facts: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...] = ()


def render(page: Page, written: str) -> str:
    """The page as HTML. written: the date, which stands in one place; all else follows from `page`."""
    from plotly.offline import get_plotlyjs

    links = "".join(f'<a href="#{section.key}">{escape(section.title)}</a>' for section in page.sections)
    cards = "".join(
        f'<div class="card"><span>{escape(what)}</span><b>{escape(figure)}</b><span>{escape(where)}</span></div>'
        for what, figure, where in page.cards
    )
    warnings = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in page.warnings)
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in page.facts)
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(page.title)}</title>",
            f"<style>{_resource('page.css')}</style>",
            f"<script>{get_plotlyjs()}</script>",
            "</head><body><main>",
            f"<header><h1>{escape(page.title)}</h1><p>{escape(page.subtitle)}</p></header>",
            warnings,
            f'<div class="cards">{cards}</div>',
            f"<nav>{links}</nav>",
            *(_section(section) for section in page.sections),
            f'<footer><dl>{facts}</dl><p>Written <time id="written">{escape(written)}</time></p></footer>',
            "</main>",
            f"<script>{_resource('page.js')}</script>",
            "</body></html>",
            "",
        )
    )


def _section(section: Section) -> str:
    blocks = (_figure(block) if isinstance(block, Figure) else _table(block) for block in section.blocks)
    return "\n".join((f'<section id="{section.key}"><h2>{escape(section.title)}</h2>', *blocks, "</section>"))


def _figure(figure: Figure) -> str:
    """A heading, the menu if there is one, and an empty block that the page's script draws into."""
    payload = {
        "data": figure.data,
        "layout": figure.layout,
        "choices": [{"update": choice.update, "traces": choice.traces} for choice in figure.choices],
    }
    # Nothing in JSON needs a "<" of its own, and "</script>" in a name would end the block.
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    menu = ""
    if len(figure.choices) > 1:
        entries = "".join(f"<option>{escape(choice.label)}</option>" for choice in figure.choices)
        menu = f'<label>{escape(figure.menu)} <select data-menu="{figure.key}">{entries}</select></label>'
    return (
        f'<div class="block"><div class="head"><h3>{escape(figure.title)}</h3>{menu}</div>'
        f'<div class="plot" id="plot-{figure.key}" data-figure="{figure.key}"></div>'
        f'<script type="application/json" id="figure-{figure.key}">{text}</script>'
        f'<p class="note">{escape(figure.note)}</p></div>'
    )


def _table(sheet: Sheet) -> str:
    if not sheet.rows:
        return ""
    classes = ["words" if column < sheet.text_columns else "figures" for column in range(len(sheet.columns))]
    head = "".join(f'<th class="{kind}">{escape(name)}</th>' for kind, name in zip(classes, sheet.columns, strict=True))
    rows = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(classes, row)) + "</tr>\n"
        for row in sheet.rows
    )
    return (
        f'<div class="block"><div class="head"><h3>{escape(sheet.title)}</h3></div><div class="scroll">'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
        f'<p class="note">{escape(sheet.note)}</p></div>'
    )


def _resource(name: str) -> str:
    return (resources.files("ep.report") / name).read_text(encoding="utf-8")

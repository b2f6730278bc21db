"""The steps of a rule as rows of a table."""

from __future__ import annotations

from ep.explain.steps import Rule
from ep.explain.words import span


def rule_rows(rule: Rule) -> list[tuple[str, ...]]:
    """step, times, tokens, sequence, captured, because."""
    return [
        (
            step.phase,
            f"{step.count:,}",
            _tokens(step.tokens, step.padded, step.detail),
            span(step.positions) if step.positions is not None else "",
            step.graph if step.captured else "no",
            step.why,
        )
        for step in rule.steps
    ]


def _tokens(tokens: tuple[int, int], padded: int | None, detail: str) -> str:
    if " x " in detail:
        return detail.removesuffix(" tokens")
    return span(tokens) + (f" -> {padded}" if padded is not None else "")

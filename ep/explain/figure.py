"""A number and where it comes from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["measured", "published", "estimated"]

KINDS: tuple[Kind, ...] = ("measured", "published", "estimated")
"""From the surest to the least sure."""


@dataclass(frozen=True)
class Figure:
    """source: who measured or published it and how, or what it is estimated from."""

    value: float
    kind: Kind
    source: str


def weakest(kinds: Iterable[Kind]) -> Kind:
    """What a figure is that was made from figures of these kinds."""
    return max(kinds, key=KINDS.index)

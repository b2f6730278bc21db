"""What commands' options are made of beyond click's own: lists with commas, other commands' flags."""

from __future__ import annotations

import math
import shlex
from typing import Any

import click

TRANSPORTS = ("auto", "socket", "ipc", "local")


class FlagsForVllm(click.Command):
    """A command whose parameter `vllm_flags` is all that follows `--`, whichever arguments stand before it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        split = args.index("--") if "--" in args else len(args)
        rest = super().parse_args(ctx, args[:split])
        ctx.params["vllm_flags"] = tuple(args[split + 1 :])
        return rest

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- VLLM FLAGS]"]


class Listing(click.ParamType):
    """Numbers with commas between them: a tuple of ints of at least `least`, or of floats above 0, `inf` included."""

    def __init__(self, kind: type[int] | type[float], least: int = 1) -> None:
        self._kind, self._least = kind, least
        self.name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        found = tuple(self._number(text, param, ctx) for text in str(value).split(","))
        if len(set(found)) < len(found):
            self.fail(f"{value} names one number twice", param, ctx)
        return found

    def _number(self, text: str, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = self._kind(text)
        except ValueError:
            number = math.nan
        wanted = f"whole numbers of at least {self._least}" if self._kind is int else "numbers above 0"
        if not (number >= self._least if self._kind is int else number > 0):
            self.fail(f"{text!r}: expected {wanted}, with commas between them", param, ctx)
        return number


class Words(click.ParamType):
    """Flags of another command, quoted as in a shell: a tuple of its arguments."""

    name = "FLAGS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(shlex.split(value))
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Without the lists that were left out: their defaults lie in modules that are slow to import."""
    return {name: value for name, value in options.items() if value != ()}

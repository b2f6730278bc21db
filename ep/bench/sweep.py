"""The points of a sweep: how many requests are in flight, or come in a second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ep.errors import OptionError

DEFAULT_CONCURRENCY = 16
_PROMPTS_PER_STREAM, _PROMPTS_AT_A_RATE = 4, 64


@dataclass(frozen=True)
class Point:
    """concurrency: requests in flight at most, None for any number. request_rate: requests sent in a second, None for
    as many as concurrency allows."""

    concurrency: int | None
    request_rate: float | None
    num_prompts: int

    @property
    def label(self) -> str:
        """As a row of a table names it."""
        bound = f"{self.concurrency} in flight" if self.concurrency is not None else ""
        if self.request_rate is not None:
            rate = f"{self.request_rate:g} requests/s"
            return f"{rate}, at most {bound}" if bound else rate
        return bound or "all at once"


def sweep(concurrency: Sequence[int], request_rate: Sequence[float], num_prompts: int | None) -> tuple[Point, ...]:
    """The points of `--concurrency` and `--request-rate`, each empty where it was not given; inf is no rate.

    num_prompts: of each point; None: 4 for each request in flight, 64 at a rate. Raises OptionError where both are
    lists.
    """
    if len(concurrency) > 1 and request_rate:
        streams, rates = ",".join(map(str, concurrency)), ",".join(f"{rate:g}" for rate in request_rate)
        raise OptionError(
            f"--concurrency {streams} --request-rate {rates}: expected a list for one of them; with rates, "
            "--concurrency is one number, a bound"
        )
    if not request_rate:
        return tuple(
            Point(n, None, num_prompts or _PROMPTS_PER_STREAM * n) for n in concurrency or (DEFAULT_CONCURRENCY,)
        )
    bound = concurrency[0] if concurrency else None
    return tuple(
        Point(bound, None if math.isinf(rate) else rate, num_prompts or _PROMPTS_AT_A_RATE) for rate in request_rate
    )

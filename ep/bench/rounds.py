"""Servers measured in turns: rounds over the points of a sweep, and what is left of them."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ep.bench.client import Client, Load, Percentiles, Served
from ep.bench.server import Server
from ep.bench.sweep import Point
from ep.errors import EpError
from ep.terminal import Terminal


@dataclass(frozen=True)
class Target:
    """A server to be measured: its address, the model's name there, the tokenizer for the client's prompts."""

    name: str
    url: str
    model: str
    tokenizer: str
    server: Server | None = None
    start_s: float = 0.0


@dataclass(frozen=True)
class Round:
    """One run of the client against one server.

    cpu_s_per_1000_tokens: by kind of process, the client's warm-up included in both; empty for a server that was
    not started here. idle_cores: CPU cores that the other server, which had no requests, used meanwhile.
    """

    server: str
    round_idx: int
    served: Served
    cpu_s_per_1000_tokens: dict[str, float]
    idle_cores: float


@dataclass(frozen=True)
class Summary:
    """Medians over a server's rounds, and the range of its throughput."""

    served: Served
    slowest: float
    fastest: float
    cpu_s_per_1000_tokens: dict[str, float]


@dataclass(frozen=True)
class Spread:
    """Of the rounds' values."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """One point. ratio: ep's output tokens per second over native's, of every round; None without a baseline."""

    point: Point
    rounds: tuple[Round, ...]
    servers: dict[str, Summary]
    ratio: Spread | None


@dataclass(frozen=True)
class MeasuredSweep:
    """targets: that were measured. points: those with a round that all of them ended. incomplete: why there are no
    more, None where that is all."""

    targets: tuple[Target, ...]
    points: tuple[Measured, ...]
    incomplete: str | None


def measure(
    points: Sequence[Point],
    load: Load,
    num_rounds: int,
    groups: Iterable[Sequence[Target]],
    num_servers: int,
    terminal: Terminal,
    logs: Path,
) -> MeasuredSweep:
    """Every round goes through all points and, at each, through all servers that are up, which take turns in going
    first; a round before them warms up and is thrown away. What ends it early, Ctrl-C or a server that fails, leaves
    the rounds that all servers have ended, or all those that the next ones have not begun with.

    groups: servers that are up at the same time, one list after the other; num_servers: in all of them.
    load: what all points have in common. Every round and point has prompts of its own, the same for all servers.
    Raises what ended the measurement before there was a round.
    """
    rounds: list[list[Round]] = [[] for _ in points]
    total = (num_rounds + 1) * len(points) * num_servers
    begun: list[Sequence[Target]] = []
    incomplete = None
    with Client(logs) as client, terminal.progress("measuring", total=total, per_second=1) as (bar, task):
        try:
            for targets in groups:
                begun.append(targets)
                for point_idx, found in _take_turns(points, load, num_rounds, targets, client):
                    bar.advance(task)
                    if found.round_idx >= 0:
                        rounds[point_idx].append(found)
                        speed = f"{found.server} {found.served.output_tokens_per_s:.0f} tokens/s"
                        terminal.say(f"round {found.round_idx}, {points[point_idx].label}: {speed}")
        except (KeyboardInterrupt, EpError) as error:
            incomplete = str(error) or "interrupted"
            measured = {one.server for of_point in rounds for one in of_point}
            begun = [group for group in begun if measured.issuperset(target.name for target in group)]
            rounds = [whole_rounds(of_point, sum(map(len, begun))) for of_point in rounds]
            if not any(rounds):
                raise
    summed_up = tuple(sum_up(point, of_point) for point, of_point in zip(points, rounds) if of_point)
    return MeasuredSweep(tuple(target for group in begun for target in group), summed_up, incomplete)


def whole_rounds(rounds: Sequence[Round], num_servers: int) -> list[Round]:
    """Of one point: those that all servers ended."""
    ended = Counter(one.round_idx for one in rounds)
    return [one for one in rounds if ended[one.round_idx] == num_servers]


def _take_turns(
    points: Sequence[Point], load: Load, num_rounds: int, targets: Sequence[Target], client: Client
) -> Iterator[tuple[int, Round]]:
    """Every run of the client as it ends, with which point it is of; round -1 warms up."""
    for round_idx in range(-1, num_rounds):
        for point_idx, point in enumerate(points):
            seed = load.seed + (round_idx + 1) * len(points) + point_idx
            at = replace(
                load,
                concurrency=point.concurrency,
                request_rate=point.request_rate,
                num_prompts=point.num_prompts,
                seed=seed,
            )
            for target in targets if round_idx % 2 else targets[::-1]:
                others = [other.server for other in targets if other is not target and other.server]
                name = f"{target.name}-{point_idx}-{round_idx if round_idx >= 0 else 'warm-up'}"
                yield point_idx, _round(at, target, others, round_idx, client, name)


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def idle_cores(rounds: Sequence[Round], server: str) -> float:
    """CPU cores that a server used while another was measured."""
    return statistics.median(r.idle_cores for r in rounds if r.server != server)


def _round(load: Load, target: Target, others: Sequence[Server], round_idx: int, client: Client, name: str) -> Round:
    server = target.server
    before = server.cpu_seconds() if server else {}
    tokens_before = server.generated_tokens() if server else 0
    idle_before, since = sum(sum(other.cpu_seconds().values()) for other in others), time.monotonic()
    served = client.run(load, target.url, target.model, target.tokenizer, name)
    idle = sum(sum(other.cpu_seconds().values()) for other in others) - idle_before
    used = idle / (time.monotonic() - since)
    per_1000: dict[str, float] = {}
    if server:
        tokens = server.generated_tokens() - tokens_before
        after = server.cpu_seconds()
        per_1000 = {label: (after[label] - before.get(label, 0.0)) / tokens * 1000 for label in after}
    return Round(target.name, round_idx, served, per_1000, used)


def sum_up(point: Point, rounds: Sequence[Round]) -> Measured:
    """What the rounds of one point come to; ours is the first of the servers."""
    names = list(dict.fromkeys(sorted((r.server for r in rounds), key=lambda name: name != "ep")))
    speed = {(r.server, r.round_idx): r.served.output_tokens_per_s for r in rounds}
    ratios = [value / speed["native", idx] for (name, idx), value in speed.items() if name == "ep" and len(names) > 1]
    return Measured(
        point,
        tuple(rounds),
        {name: _summary([r for r in rounds if r.server == name]) for name in names},
        spread(ratios) if ratios else None,
    )


def _summary(rounds: Sequence[Round]) -> Summary:
    def median(value: Callable[[Served], float]) -> float:
        return statistics.median(value(r.served) for r in rounds)

    def percentiles(latency: str) -> Percentiles:
        of: list[Percentiles] = [getattr(r.served, latency) for r in rounds]
        return Percentiles(*(statistics.median(getattr(p, name) for p in of) for name in ("p50", "p90", "p99")))

    speeds = [r.served.output_tokens_per_s for r in rounds]
    labels = sorted({label for r in rounds for label in r.cpu_s_per_1000_tokens})
    return Summary(
        served=Served(
            duration_s=median(lambda served: served.duration_s),
            requests_per_s=median(lambda served: served.requests_per_s),
            output_tokens_per_s=median(lambda served: served.output_tokens_per_s),
            total_tokens_per_s=median(lambda served: served.total_tokens_per_s),
            ttft_ms=percentiles("ttft_ms"),
            tpot_ms=percentiles("tpot_ms"),
            itl_ms=percentiles("itl_ms"),
        ),
        slowest=min(speeds),
        fastest=max(speeds),
        cpu_s_per_1000_tokens={
            label: statistics.median(r.cpu_s_per_1000_tokens.get(label, 0.0) for r in rounds) for label in labels
        },
    )

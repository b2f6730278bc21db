"""`ep bench transport`: one layer's round trip without compute, between a router and shards in their own processes.

Timed: writing the rows to where they leave from, all dispatches, all answers; the shard copies the rows it gets into
its answer. The router takes turns with gloo's isend/irecv, what torch offers for the same job, as a baseline.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import Progress

from ep.bench.conditions import Conditions, conditions
from ep.bench.echo import FINGERPRINT, EchoSetup, GlooRouter, start_echo
from ep.bench.page import Report
from ep.bench.plot import Figure, Series
from ep.bench.result import publish
from ep.errors import OptionError, TransportError
from ep.sheet import Sheet
from ep.transport.auth import new_key
from ep.transport.base import Partial
from ep.transport.buffer import to_raw
from ep.transport.handshake import Greeting
from ep.transport.sockets import SocketTransport
from ep.wire import Dispatch

WAYS = ("shm", "tcp", "gloo")
LOADS = ("split", "full", "one")
Times = npt.NDArray[np.float64]
NODE, OTHER_NODE = "router's node", "another node"
DEADLINE_S = 30.0


@dataclass(frozen=True)
class TransportBenchOptions:
    """Options of `ep bench transport`.

    shards: numbers of shards to measure with. ways: shm (shared memory on a node), tcp (127.0.0.x, as between nodes),
    gloo (the baseline). rounds: all loads and ways in turn, so that the machine's drift meets each of them.
    """

    num_tokens: int = 128
    hidden_size: int = 7168
    shards: tuple[int, ...] = (2, 4)
    ways: tuple[str, ...] = WAYS
    iterations: int = 400
    rounds: int = 5
    output: str | None = None
    page: str | None = None


@dataclass(frozen=True)
class RoundTrips:
    """One way, load and number of shards. split: num_tokens / shards tokens to each; full: num_tokens to each; one: a
    single token to each. Microseconds; p50 and p99 are medians over rounds, best_p50 the lowest round's. gb_per_s:
    bytes of tensors, both directions and all shards, over p50."""

    way: str
    load: str
    num_shards: int
    tokens_per_shard: int
    p50_us: float
    p99_us: float
    p50_us_rounds: tuple[float, ...]
    p99_us_rounds: tuple[float, ...]
    best_p50_us: float
    gb_per_s: float


@dataclass(frozen=True)
class TransportBench:
    options: TransportBenchOptions
    conditions: Conditions
    round_trips: tuple[RoundTrips, ...]


def run(options: TransportBenchOptions) -> TransportBench:
    """Raises OptionError, TransportError; every payload is compared with what was sent."""
    _check(options)
    before = conditions()
    torch.set_num_threads(1)
    found: list[RoundTrips] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(
            "round trips", total=options.rounds * len(LOADS) * len(options.ways) * len(options.shards)
        )
        for num_shards in options.shards:
            samples: dict[tuple[str, str], list[Times]] = {}
            with _Rig(options, num_shards) as rig:
                for _ in range(options.rounds):
                    for load in LOADS:
                        for way in options.ways:
                            tokens = _tokens(load, options.num_tokens, num_shards)
                            samples.setdefault((load, way), []).append(rig.measure(way, tokens))
                            progress.advance(task)
            found += [_summary(options, load, way, num_shards, times) for (load, way), times in samples.items()]
    return TransportBench(options, before, tuple(found))


def report(result: TransportBench) -> None:
    """A table, then one line of JSON."""
    publish("transport", result, describe(result), Console())


def describe(result: TransportBench) -> Report:
    """The table, and a plot of the medians for each number of shards."""
    tokens, hidden = result.options.num_tokens, result.options.hidden_size
    rows = tuple(
        (
            row.load,
            str(row.num_shards),
            row.way,
            str(row.tokens_per_shard),
            f"{row.p50_us:,.1f}",
            f"{row.p99_us:,.1f}",
            f"{row.best_p50_us:,.1f}",
            f"{row.gb_per_s:.2f}",
        )
        for row in result.round_trips
    )
    columns = ("load", "shards", "way", "tokens each", "p50", "p99", "best p50", "GB/s")
    title = f"Round trip of {tokens} tokens x {hidden} bf16, µs"
    return Report(
        "Round trips between router and shards",
        (Sheet(title, columns, rows, text_columns=3),),
        tuple(_figure(result, num_shards) for num_shards in result.options.shards),
        f"{tokens} tokens of {hidden} bf16, {result.options.iterations} round trips in each of {result.options.rounds} "
        "rounds; p50 and p99 are medians over the rounds. split: the tokens divided among the shards; full: all of "
        "them to each; one: a single token to each.",
    )


def _figure(result: TransportBench, num_shards: int) -> Figure:
    series = []
    for way in result.options.ways:
        rows = [row for row in result.round_trips if (row.num_shards, row.way) == (num_shards, way)]
        places, p50s = tuple(row.load for row in rows), tuple(row.p50_us for row in rows)
        series.append(Series(way, places, p50s, p50s, tuple(row.p99_us for row in rows)))
    title = f"{num_shards} shards: p50, and up to p99"
    return Figure(f"shards-{num_shards}", title, "load", "µs", tuple(series), "bars")


def _check(options: TransportBenchOptions) -> None:
    unknown = [way for way in options.ways if way not in WAYS]
    if unknown:
        raise OptionError(f"way is {unknown[0]}, expected one of {', '.join(WAYS)}")
    if min(options.shards, default=0) < 1 or max(options.shards) > options.num_tokens:
        raise OptionError(f"shards is {options.shards}, expected 1 to {options.num_tokens}, the number of tokens")
    if min(options.iterations, options.rounds, options.hidden_size) < 1:
        raise OptionError("iterations, rounds and hidden size are expected to be at least 1")


def _tokens(load: str, num_tokens: int, num_shards: int) -> int:
    return {"split": num_tokens // num_shards, "full": num_tokens, "one": 1}[load]


def _summary(options: TransportBenchOptions, load: str, way: str, num_shards: int, rounds: list[Times]) -> RoundTrips:
    tokens = _tokens(load, options.num_tokens, num_shards)
    p50s, p99s = (tuple(round(float(np.percentile(times, p)), 1) for times in rounds) for p in (50, 99))
    p50 = statistics.median(p50s)
    return RoundTrips(
        way=way,
        load=load,
        num_shards=num_shards,
        tokens_per_shard=tokens,
        p50_us=round(p50, 1),
        p99_us=round(statistics.median(p99s), 1),
        p50_us_rounds=p50s,
        p99_us_rounds=p99s,
        best_p50_us=min(p50s),
        gb_per_s=round(2 * num_shards * tokens * options.hidden_size * 2 / p50 / 1e3, 2),
    )


class _Rig:
    """The processes of one number of shards, up for all rounds."""

    def __init__(self, options: TransportBenchOptions, num_shards: int) -> None:
        self._options = options
        self._num_shards = num_shards
        self._stack = ExitStack()
        self._callers: dict[str, _Caller] = {}
        self._gloo: GlooRouter | None = None

    def __enter__(self) -> _Rig:
        options, key = self._options, new_key()
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ep-"))
            echoes = []
            for shard_idx in range(self._num_shards):
                host = f"127.0.0.{shard_idx + 2}"
                setup = EchoSetup(shard_idx, key, NODE, folder, host, options.hidden_size, options.num_tokens)
                echoes.append(start_echo(setup))
                stack.callback(echoes[-1].stop)
            greeting = Greeting(f"bench-{os.getpid()}", FINGERPRINT, options.hidden_size, options.num_tokens, 1)
            for way, node in (("shm", NODE), ("tcp", OTHER_NODE)):
                if way in options.ways:
                    transport = SocketTransport([echo.endpoint for echo in echoes], greeting, key, node)
                    stack.callback(transport.close)
                    self._callers[way] = _Caller(transport)
            if "gloo" in options.ways:
                self._gloo = GlooRouter(self._num_shards, options.hidden_size)
                stack.callback(self._gloo.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def measure(self, way: str, tokens: int) -> Times:
        """Microseconds of each round trip of `tokens` rows to every shard."""
        iterations = self._options.iterations
        warmup = max(iterations // 10, 3)
        round_trip: Callable[[list[torch.Tensor]], list[torch.Tensor]]
        if way == "gloo":
            assert self._gloo is not None
            self._gloo.expect(tokens, warmup + iterations)
            round_trip = self._gloo.round_trip
        else:
            round_trip = self._callers[way]
        rows = [torch.randn(tokens, self._options.hidden_size).to(torch.bfloat16) for _ in range(self._num_shards)]
        times = np.zeros(warmup + iterations)
        with torch.inference_mode():
            for iteration in range(len(times)):
                for part in rows:
                    part[0, 0] = iteration
                start = time.perf_counter()
                answers = round_trip(rows)
                times[iteration] = (time.perf_counter() - start) * 1e6
                if not all(torch.equal(part, answer) for part, answer in zip(rows, answers, strict=True)):
                    raise TransportError(f"round trip {iteration} over {way} brought back other rows than were sent")
        return times[warmup:]


class _Caller:
    """One round trip over the transport, as the router makes it."""

    def __init__(self, transport: SocketTransport) -> None:
        self._transport = transport
        self._seq = 0

    def __call__(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        self._seq += 1
        deadline = time.monotonic() + DEADLINE_S
        for shard_idx, part in enumerate(rows):
            message = Dispatch(self._seq, 0, 0, "bf16", "bf16", len(part), len(part))
            views = self._transport.prepare(shard_idx, message, deadline)
            views.counts.fill(1)
            views.slot_ids.fill(0)
            views.weights.fill(1)
            views.rows[:] = to_raw(part, "bf16")
            self._transport.dispatch(shard_idx)
        answers: list[Partial] = [self._transport.receive(deadline) for _ in rows]
        return [answer.rows for answer in sorted(answers, key=lambda answer: answer.shard_idx)]

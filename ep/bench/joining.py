"""`ep bench joining`: routers that decode, each with a shard in its process on a GPU of its own. Do their messages come
together, so that the experts' weights are read once for all of them, and what is a step then?

No server and no vLLM: products of matrices stand for what a step does beside its experts. In turns with jobs that wait
for routers (kernels/p2p.py `take`), the same with jobs that take what is there.

Where routers share a GPU, as they must on a machine with one, NVIDIA's MPS has to give each a part of it: without, they
have it in turns of milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from ep.bench.conditions import Conditions, conditions
from ep.bench.page import Report
from ep.bench.plot import Figure, Series
from ep.bench.result import publish
from ep.devices import count_gpus
from ep.errors import OptionError
from ep.presets import load_preset
from ep.sheet import Sheet
from ep.terminal import Terminal

if TYPE_CHECKING:
    from ep.bench.joining_router import JoiningRun
    from ep.model import ModelSpec

COMMAND = "ep bench joining"
START_S = 300.0
_JOBS = {True: "waits", False: "takes what is there"}


@dataclass(frozen=True)
class JoiningOptions:
    """Options of `ep bench joining`. num_tokens: of a step of each router. routers: None for one on each GPU; more than
    there are GPUs share them. layers: MoE layers of a step. between_us, rest_us: what a step computes between two of
    them, and beside that. seconds: of each measurement. stall_ms: for so long a router's host stalls once in
    stall_every steps, at random."""

    model: str = "deepseek-v3"
    routers: int | None = None
    num_tokens: tuple[int, ...] = (16, 64, 128)
    layers: int = 2
    between_us: float = 250.0
    rest_us: float = 2100.0
    seconds: float = 2.0
    stall_ms: float = 20.0
    stall_every: int = 60
    seed: int = 0
    output: str | None = None
    page: str | None = None


@dataclass(frozen=True)
class Joining:
    """One measurement. waits: whether jobs waited for routers; stalls: whether hosts stalled. step_ms, mean_ms: median
    and mean over all routers' steps; joined: the part of the messages that jobs answered together with others."""

    num_tokens: int
    waits: bool
    stalls: bool
    num_steps: int
    step_ms: float
    mean_ms: float
    joined: float


@dataclass(frozen=True)
class JoiningBench:
    conditions: Conditions
    options: JoiningOptions
    num_routers: int
    num_gpus: int
    found: tuple[Joining, ...]


def run(options: JoiningOptions) -> JoiningBench:
    """Measures, prints a table and one line of JSON. Raises OptionError, ModelError, and EpError for a router that
    fails."""
    spec, num_gpus = load_preset(options.model).spec, count_gpus()
    num_routers = _check(options, spec, num_gpus)
    at, terminal = conditions(), Terminal()
    found = []
    with (
        terminal.progress("starting", total=4 * len(options.num_tokens)) as (bar, task),
        _routers(options, spec, num_routers, num_gpus) as routers,
    ):
        for waits in (True, False):
            routers.connect(waits)
            for num_tokens in options.num_tokens:
                routers.all("prepare", num_tokens)
                for stalls in (False, True):
                    bar.update(task, description=f"{num_tokens} tokens")
                    runs = routers.measure(stalls)
                    found.append(sum_up(num_tokens, waits, stalls, runs))
                    bar.advance(task)
            routers.all("stop")
    bench = JoiningBench(at, options, num_routers, num_gpus, tuple(found))
    publish("joining", bench, describe(bench), terminal.console)
    return bench


def sum_up(num_tokens: int, waits: bool, stalls: bool, runs: Sequence[JoiningRun]) -> Joining:
    """Of all routers."""
    steps = [ms for one in runs for ms in one.step_ms]
    joined = sum(one.joined for one in runs) / sum(one.messages for one in runs)
    return Joining(num_tokens, waits, stalls, len(steps), statistics.median(steps), statistics.fmean(steps), joined)


def describe(result: JoiningBench) -> Report:
    """The table, and a plot of the mean steps."""
    options = result.options
    rows = []
    for one in sorted(result.found, key=lambda one: (one.num_tokens, one.stalls, not one.waits)):
        rows.append(
            (
                str(one.num_tokens),
                "yes" if one.stalls else "no",
                _JOBS[one.waits],
                f"{one.num_steps:,}",
                f"{one.step_ms:.2f}",
                f"{one.mean_ms:.2f}",
                f"{one.joined:.0%}",
            )
        )
    columns = ("tokens", "stalls", "a job", "steps", "median ms", "mean ms", "joined")
    places = f"{result.num_gpus} GPUs" if result.num_gpus > 1 else "one GPU"
    title = f"{result.num_routers} routers on {places}, a shard beside each: a step of {options.layers} MoE layers"
    series = []
    for waits in (True, False):
        of = [one for one in result.found if one.waits == waits and not one.stalls]
        tokens, means = tuple(one.num_tokens for one in of), tuple(one.mean_ms for one in of)
        series.append(Series(_JOBS[waits], tokens, means, dashed=not waits))
    figure = Figure("step", "A step, mean", "tokens of a router", "ms", tuple(series), log_x=True)
    return Report(
        "Routers that decode, in step or not",
        (Sheet(title, columns, tuple(rows)),),
        (figure,) if len(options.num_tokens) > 1 else (),
        f"{options.model}: every router computes products for {options.rest_us:g} µs, its first MoE layer, then "
        f"{options.between_us:g} µs before each further one. Stalls: the host of each waits {options.stall_ms:g} ms "
        f"once in {options.stall_every} steps, at random. joined: messages that a job answered together with others.",
    )


def _check(options: JoiningOptions, spec: ModelSpec, num_gpus: int) -> int:
    """How many routers."""
    num_routers = options.routers or num_gpus
    if not num_gpus:
        raise OptionError(f"{COMMAND}: found no GPU")
    if num_routers < 2:
        of_their_own = ", or --routers 2, which share this one and need MPS for it" if num_gpus == 1 else ""
        raise OptionError(f"{COMMAND}: {num_routers} routers, expected at least 2, each on its own GPU{of_their_own}")
    if spec.num_experts % num_routers:
        raise OptionError(f"{COMMAND}: {spec.num_experts} experts cannot be split over {num_routers} shards evenly")
    return num_routers


@contextmanager
def _routers(options: JoiningOptions, spec: ModelSpec, num_routers: int, num_gpus: int) -> Iterator[_Routers]:
    """All loaded."""
    from ep.bench.joining_router import JoiningSetup, serve

    start, block = multiprocessing.get_context("spawn"), f"bench-{os.getpid()}"
    pipes, processes = [], []
    try:
        for router_idx in range(num_routers):
            ours, theirs = start.Pipe()
            setup = JoiningSetup(
                block, spec, options.layers, num_routers, router_idx, router_idx % num_gpus, options.between_us,
                options.rest_us,
            )  # fmt: skip
            processes.append(start.Process(target=serve, args=(setup, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        routers = _Routers(options, pipes)
        routers.answers("start")
        yield routers
    finally:
        for process in processes:
            process.terminate()
            process.join()


class _Routers:
    """In their processes, asked all at once."""

    def __init__(self, options: JoiningOptions, pipes: Sequence[Connection]) -> None:
        self._options, self._pipes = options, pipes

    def connect(self, waits: bool) -> None:
        """New shards, and every router to all of them."""
        routers = self.all("start", waits)
        shards = self.all("attach", routers)
        self.each("connect", [([of[idx] for of in shards],) for idx in range(len(self._pipes))])

    def measure(self, stalls: bool) -> list[JoiningRun]:
        options = self._options
        stall_ms, seed = options.stall_ms if stalls else 0.0, options.seed
        common = (options.seconds, stall_ms, options.stall_every)
        return self.each("measure", [(*common, seed + idx) for idx in range(len(self._pipes))])

    def all(self, name: str, *arguments: object) -> list[Any]:
        return self.each(name, [arguments] * len(self._pipes))

    def each(self, name: str, arguments: Sequence[tuple[object, ...]]) -> list[Any]:
        for pipe, of in zip(self._pipes, arguments, strict=True):
            pipe.send((name, *of))
        return self.answers(name)

    def answers(self, what: str) -> list[Any]:
        """Raises TransportError."""
        from ep.bench.ipc_shards import answer

        complaint = f"{COMMAND}: a router's process gave no answer to {what!r}; its messages are above"
        return [answer(pipe, START_S, complaint) for pipe in self._pipes]

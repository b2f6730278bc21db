"""`ep bench rebalance`: what moving experts costs those who are being served, and what it gives them.

    the same requests three times: before ─> while the shards are levelled ─> after
"""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from ep.bench.conditions import Conditions, conditions
from ep.bench.page import Report
from ep.bench.plot import Figure, Series
from ep.bench.result import publish
from ep.bench.server import EP_COMMAND, Server, free_port
from ep.bench.streams import Stream, StreamLoad, gaps_ms, run_streams, tokens_per_s
from ep.cluster.rebalancer import Outcome
from ep.errors import ClusterError
from ep.instances import choose, coordinators
from ep.sheet import Sheet
from ep.target import resolve_target
from ep.terminal import Terminal, state_dir

START_MOVE_AT = 0.3
"""Of the time that the first run took: so far into the second one the move begins."""


@dataclass(frozen=True)
class RebalanceBenchOptions:
    """A stand-in or checkpoint on `shards` shards with `redundant` replicas a layer, under `concurrency` streams. By
    default all of them decode while experts move: the gap that a prompt's prefill makes is not the move's."""

    model: str = "deepseek-v3"
    checkpoint: str | None = None
    shards: int = 4
    redundant: int = 0
    concurrency: int = 16
    num_prompts: int = 16
    input_len: int = 32
    output_len: int = 400
    seed: int = 0
    ready_s: float = 600.0
    output: str | None = None
    page: str | None = None


@dataclass(frozen=True)
class Phase:
    """One run of the requests. Gaps are between two pieces of a stream, milliseconds."""

    tokens_per_s: float
    gap_p50_ms: float
    gap_p99_ms: float
    gap_max_ms: float
    num_failed: int


@dataclass(frozen=True)
class RebalanceBench:
    """switch_gap_max_ms: the longest gap while experts moved and routers went over, allowed: twice the median before.
    num_different: requests whose text is not what it was in the first run."""

    conditions: Conditions
    options: RebalanceBenchOptions
    outcome: Outcome
    before: Phase
    during: Phase
    after: Phase
    switch_s: float
    switch_gap_p50_ms: float
    switch_gap_max_ms: float
    num_different: int


def run(options: RebalanceBenchOptions, terminal: Terminal) -> RebalanceBench:
    """Starts a server of its own. Raises OptionError, CheckpointError, ClusterError."""
    import ray

    at = conditions()
    target = resolve_target(options.model, options.checkpoint, options.checkpoint is None, terminal)
    logs = state_dir() / "logs" / f"bench-rebalance-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    logs.mkdir(parents=True)
    terminal.say(f"logs: {logs}")
    port = free_port()
    command = [*EP_COMMAND, options.model, "--checkpoint", str(target.checkpoint), "--address", "local"]
    command += ["--shards", str(options.shards), "--redundant", str(options.redundant), "--no-auto-rebalance"]
    url = f"http://127.0.0.1:{port}"
    server = Server("ep", [*command, "--host", "127.0.0.1", "--port", str(port)], url, logs / "ep.log")
    load = StreamLoad(
        options.num_prompts, options.concurrency, options.input_len, options.output_len, options.seed
    )
    with ExitStack() as stack:
        stack.callback(server.stop)
        with terminal.console.status("starting the server"):
            server.wait_until_ready(options.ready_s)
        told = re.search(r"Ray(?: cluster)? at (\S+)", (logs / "ep.log").read_text())
        if told is None:
            raise ClusterError(f"{logs / 'ep.log'}: the server does not say where its Ray cluster is")
        with terminal.quiet("bench-rebalance"):
            _, coordinator = choose(stack.enter_context(coordinators(told.group(1))), None)
            with terminal.console.status("before"):
                run_streams(load, url, target.name)  # the first requests compile and fill caches
                before = run_streams(load, url, target.name)
            wait_s = START_MOVE_AT * (max(s.came[-1] for s in before) - min(s.asked for s in before))
            with terminal.console.status("moving"), ThreadPoolExecutor(1) as pool:
                running = pool.submit(run_streams, load, url, target.name)
                time.sleep(wait_s)
                start = time.monotonic()
                outcome: Outcome = ray.get(coordinator.rebalance.remote(True))
                end = time.monotonic()
                during = running.result()
            with terminal.console.status("after"):
                after = run_streams(load, url, target.name)
    switch = gaps_ms(during, start, end)
    return RebalanceBench(
        conditions=at,
        options=options,
        outcome=outcome,
        before=_phase(before),
        during=_phase(during),
        after=_phase(after),
        switch_s=round(end - start, 3),
        switch_gap_p50_ms=round(float(np.median(switch)), 2),
        switch_gap_max_ms=round(float(switch.max()), 2),
        num_different=sum(len({s.text for s in same}) > 1 for same in zip(before, during, after)),
    )


def show(result: RebalanceBench, console: Console) -> None:
    """The table, then one line of JSON last; the JSON also goes into options.output."""
    publish("rebalance", result, describe(result), console)


def describe(result: RebalanceBench) -> Report:
    """The table, and a plot of throughput and gaps of the three runs."""
    phases = {"before": result.before, "during": result.during, "after": result.after}
    rows = tuple(
        (label, *(form.format(getattr(phase, name)) for phase in phases.values()))
        for label, name, form in (
            ("tokens/s", "tokens_per_s", "{:.0f}"),
            ("gap p50, ms", "gap_p50_ms", "{:.1f}"),
            ("gap p99, ms", "gap_p99_ms", "{:.1f}"),
            ("longest gap, ms", "gap_max_ms", "{:.1f}"),
            ("failed requests", "num_failed", "{}"),
        )
    )
    outcome = result.outcome
    note = (
        f"{outcome.outcome}: {outcome.reason}\n"
        f"(max - mean) / mean of pairs per shard {outcome.excess_before:.1%} -> {outcome.excess_after:.1%} planned; "
        f"{outcome.num_transfers} experts, {outcome.num_bytes / 1e6:.1f} MB, {outcome.num_steps} steps, "
        f"{outcome.seconds} s\n"
        f"longest gap while moving {result.switch_gap_max_ms:.1f} ms, "
        f"{result.switch_gap_max_ms / result.before.gap_p50_ms:.2f} of the median before; "
        f"{result.num_different} of {result.options.num_prompts} texts differ"
    )
    title = f"{result.options.concurrency} streams on {result.options.shards} shards while experts move"
    gaps = tuple(
        Series(label, tuple(phases), tuple(getattr(phase, name) for phase in phases.values()))
        for label, name in (("p50", "gap_p50_ms"), ("p99", "gap_p99_ms"), ("longest", "gap_max_ms"))
    )
    figure = Figure("gaps", "Gaps between two tokens of a stream", "", "ms", gaps, "bars")
    return Report("Experts moved under load", (Sheet(title, ("", *phases), rows, note),), (figure,))


def _phase(streams: list[Stream]) -> Phase:
    gaps = gaps_ms(streams)
    p50, p99 = np.percentile(gaps, [50, 99])
    return Phase(
        round(tokens_per_s(streams), 1),
        round(float(p50), 2),
        round(float(p99), 2),
        round(float(gaps.max()), 2),
        sum(bool(stream.error) for stream in streams),
    )

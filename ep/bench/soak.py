"""`ep bench soak`: half an hour of requests on several hosts; memory of every process, and every failure."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from httpx import Limits
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from ep.bench.conditions import Conditions, conditions
from ep.bench.hosts.cluster import host_cluster
from ep.bench.hosts.serving import Spread, start_server
from ep.bench.memory import Growth, MemorySampler, ProcessMemory, growths
from ep.target import resolve_target
from ep.terminal import Terminal, state_dir

MAX_GROWTH = 0.02
_MAX_ERRORS = 20
_IDLE_S, _REQUEST_S = 1.0, 600.0


@dataclass(frozen=True)
class SoakOptions:
    """`concurrency` requests at a time on `nodes` nodes with `shards_per_node` shards each, for `minutes`, the first
    warm_up_minutes of them not judged. Prompts and outputs have random lengths of up to input_len and output_len."""

    model: str = "deepseek-v3"
    checkpoint: str | None = None
    nodes: int = 2
    shards_per_node: int = 2
    minutes: float = 30.0
    warm_up_minutes: float = 10.0
    concurrency: int = 16
    input_len: int = 96
    output_len: int = 192
    sample_s: float = 10.0
    seed: int = 0
    ready_s: float = 600.0
    output: str | None = None
    page: str | None = None


@dataclass(frozen=True)
class SoakBench:
    """hosts: how they were made. errors: of the first failed requests. times: seconds of the memory's samples. growths:
    of the processes that were there all along, the one that grew most first. is_flat: none grew by more than
    MAX_GROWTH, and nothing failed."""

    conditions: Conditions
    options: SoakOptions
    hosts: str
    num_requests: int
    num_failed: int
    errors: tuple[str, ...]
    output_tokens: int
    output_tokens_per_s: float
    times: tuple[float, ...]
    processes: tuple[ProcessMemory, ...]
    growths: tuple[Growth, ...]
    is_flat: bool


@dataclass
class _Counts:
    requests: int = 0
    tokens: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)


def run(options: SoakOptions, terminal: Terminal) -> SoakBench:
    """Makes the cluster, serves, and takes all of it down. Raises CheckpointError, ClusterError, EpError."""
    at = conditions()
    target = resolve_target(options.model, options.checkpoint, options.checkpoint is None, terminal)
    logs = state_dir() / "logs" / f"bench-soak-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    logs.mkdir(parents=True)
    terminal.say(f"logs: {logs}")
    counts = _Counts()
    with ExitStack() as stack:
        with terminal.console.status("starting the hosts"):
            cluster = stack.enter_context(host_cluster(options.nodes, options.shards_per_node))
        terminal.say(cluster.describe())
        spread = Spread(options.nodes * options.shards_per_node, options.nodes)
        server = start_server(cluster, options.model, target.checkpoint, spread, logs / "soak.trace", logs)
        stack.callback(server.stop)
        with terminal.console.status("starting the server"):
            server.wait_until_ready(options.ready_s)
        sampler = MemorySampler(
            lambda: [*server.processes(), *cluster.processes()],
            lambda process: f"{cluster.host_of(process)} {server.label(process)}",
            options.sample_s,
        )
        sampler.start()
        stack.callback(sampler.stop)
        start = time.monotonic()
        with terminal.progress("requests for", total=round(60 * options.minutes)) as (bar, task):

            def progress() -> None:
                done = min(time.monotonic() - start, 60 * options.minutes)
                said = f"{counts.requests} requests, {counts.failed} failed, seconds"
                bar.update(task, completed=round(done), description=said)

            asyncio.run(_load(options, server.url, target.name, counts, start + 60 * options.minutes, progress))
        seconds = time.monotonic() - start
        sampler.stop()
    grown = growths(sampler.times, sampler.processes(), 60 * options.warm_up_minutes)
    return SoakBench(
        conditions=at,
        options=options,
        hosts=cluster.describe(),
        num_requests=counts.requests,
        num_failed=counts.failed,
        errors=tuple(counts.errors),
        output_tokens=counts.tokens,
        output_tokens_per_s=round(counts.tokens / seconds, 1),
        times=tuple(sampler.times),
        processes=sampler.processes(),
        growths=tuple(grown),
        is_flat=not counts.failed and all(one.growth <= MAX_GROWTH for one in grown),
    )


async def _load(
    options: SoakOptions, url: str, model: str, counts: _Counts, until: float, progress: Callable[[], None]
) -> None:
    """Requests until then; those under way are awaited."""
    # vLLM's server closes connections that are idle for 5 s; the client must not use one at that very moment.
    http = DefaultAsyncHttpxClient(limits=Limits(keepalive_expiry=_IDLE_S), timeout=_REQUEST_S)
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http)
    start = time.monotonic()

    async def ask(pick: random.Random) -> None:
        prompt = [pick.randrange(16, 256) for _ in range(pick.randint(1, options.input_len))]
        num_tokens = pick.randint(1, options.output_len)
        answer = await client.completions.create(
            model=model, prompt=prompt, max_tokens=num_tokens, temperature=0, extra_body={"ignore_eos": True}
        )
        counts.tokens += answer.usage.completion_tokens if answer.usage else 0

    async def work(worker: int) -> None:
        pick = random.Random(f"{options.seed}-{worker}")
        while time.monotonic() < until:
            try:
                await ask(pick)
            except Exception as error:  # whatever it was, the request failed, and that is what is counted
                counts.failed += 1
                if len(counts.errors) < _MAX_ERRORS:
                    at = f"{time.monotonic() - start:.0f} s, worker {worker}"
                    counts.errors.append(f"{at}: {type(error).__name__}: {error} ({error.__cause__!r})")
                await asyncio.sleep(1.0)
            counts.requests += 1
            progress()

    async with client:
        await asyncio.gather(*map(work, range(options.concurrency)))

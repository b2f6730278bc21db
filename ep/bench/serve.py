"""`ep bench serve`: throughput and latency of a server as clients see them, alone or beside native vLLM's.

Against native vLLM both servers stay up and take turns, so that the machine's drift meets both; what the idle one costs
meanwhile is measured and reported.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ep.bench.client import Load, Percentiles, Served, run_client
from ep.bench.conditions import Conditions, conditions
from ep.bench.result import print_json
from ep.bench.server import EP_COMMAND, Server, answers, free_port, served_model
from ep.checkpoint import write_dequantized
from ep.devices import count_gpus
from ep.errors import OptionError
from ep.plugin import NATIVE_LOAD_FORMAT
from ep.terminal import Terminal, state_dir
from ep.vllm_flags import KV_CACHE_BYTES

_NATIVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")


@dataclass(frozen=True)
class ServeBenchOptions:
    """Options of `ep bench serve`.

    url: measure this running server instead of starting one on a Ray of its own; `checkpoint` then names its tokenizer.
    layers: so many layers of the model's published shapes, with made weights, in place of the stand-in.
    against: "native" measures native vLLM on the same weights in the same run; None measures one server.
    ep_flags: further options of `ep serve`; vllm_flags go to vLLM in both servers.
    """

    model: str = "deepseek-v3"
    url: str | None = None
    against: str | None = None
    checkpoint: str | None = None
    layers: int | None = None
    concurrency: int = 16
    input_len: int = 32
    output_len: int = 128
    num_prompts: int = 64
    rounds: int = 5
    seed: int = 0
    ready_s: float = 600.0
    output: str | None = None
    ep_flags: tuple[str, ...] = ()
    vllm_flags: tuple[str, ...] = ()


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
class ServeBench:
    """ratio: ep's output tokens per second over native's, the median of the rounds' ratios; None without a baseline."""

    conditions: Conditions
    options: ServeBenchOptions
    commands: dict[str, str]
    logs: str
    start_s: dict[str, float]
    rounds: tuple[Round, ...]
    servers: dict[str, Summary]
    ratio: float | None


@dataclass(frozen=True)
class _Target:
    """A server to be measured: its address, the model's name there, the tokenizer for the client's prompts."""

    name: str
    url: str
    model: str
    tokenizer: str
    server: Server | None = None
    start_s: float = 0.0


def run(options: ServeBenchOptions, terminal: Terminal) -> ServeBench:
    """Starts the servers, measures them in turns and ends them. Raises OptionError, CheckpointError, EpError."""
    _check(options)
    at = conditions()
    logs = state_dir() / "logs" / f"bench-serve-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    logs.mkdir(parents=True)
    terminal.say(f"logs: {logs}")
    with ExitStack() as stack:
        targets = _targets(options, terminal, logs, stack)
        rounds = _measure(options, targets, terminal, logs)
    return ServeBench(
        conditions=at,
        options=options,
        commands={target.name: " ".join(target.server.command) for target in targets if target.server},
        logs=str(logs),
        start_s={target.name: target.start_s for target in targets if target.server},
        rounds=tuple(rounds),
        servers={target.name: _summary([r for r in rounds if r.server == target.name]) for target in targets},
        ratio=_ratio(rounds) if options.against else None,
    )


def show(result: ServeBench, console: Console) -> None:
    """The table, then one line of JSON last; the JSON also goes into options.output."""
    console.print(_table(result))
    print_json("serve", result, result.options.output)


def _check(options: ServeBenchOptions) -> None:
    if options.against not in (None, "native"):
        raise OptionError(f"--against {options.against}: expected native")
    if options.url is not None and options.checkpoint is None:
        raise OptionError(f"--url {options.url}: --checkpoint DIR must name the served model's tokenizer")
    if options.url is not None and not answers(options.url):
        raise OptionError(f"--url {options.url}: {options.url}/health does not answer")
    for name in ("concurrency", "input_len", "output_len", "num_prompts", "rounds"):
        if getattr(options, name) < 1:
            raise OptionError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least 1")
    if options.output is not None and not Path(options.output).resolve().parent.is_dir():
        raise OptionError(f"--output {options.output}: no such directory")


def _targets(options: ServeBenchOptions, terminal: Terminal, logs: Path, stack: ExitStack) -> list[_Target]:
    """The servers, each answering before the next is started, ended with the stack where they are ours."""
    from ep.target import resolve_target

    target = resolve_target(options.model, options.checkpoint, options.checkpoint is None, terminal, options.layers)
    weights = str(target.checkpoint)

    def start(name: str, command: Sequence[str], flags: Sequence[str]) -> _Target:
        port = free_port()
        server = Server(
            name,
            [*command, "--host", "127.0.0.1", "--port", str(port), *flags],
            f"http://127.0.0.1:{port}",
            logs / f"{name}.log",
        )
        stack.callback(server.stop)
        with terminal.console.status(f"starting {name}"):
            seconds = server.wait_until_ready(options.ready_s)
        terminal.say(f"{name} answers after {seconds:.1f} s")
        return _Target(name, server.url, target.name, weights, server, seconds)

    if options.url is not None:
        targets = [_Target("ep", options.url, served_model(options.url), weights)]
    else:
        command = [*EP_COMMAND, options.model, "--checkpoint", weights, "--address", "local", "--verbose"]
        command += options.ep_flags
        targets = [start("ep", command, ["--", *options.vllm_flags])]
    if options.against == "native":
        command = [*_NATIVE, *(_made_weights(weights) if target.made else _native_weights(target.checkpoint, terminal))]
        command += ["--served-model-name", target.name]
        if not count_gpus() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            command += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
        targets.append(start("native", command, options.vllm_flags))
    return targets


def _made_weights(checkpoint: str) -> list[str]:
    """Flags by which native vLLM makes the same weights as ep; on CPU in bf16, as it has no block FP8 there."""
    flags = ["--model", checkpoint, "--load-format", NATIVE_LOAD_FORMAT]
    return flags if count_gpus() else [*flags, "--hf-overrides", json.dumps({"quantization_config": None})]


def _native_weights(checkpoint: Path, terminal: Terminal) -> list[str]:
    """What native vLLM can load. It has no block FP8 on CPU: there the same weights in bf16, written beside these."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if count_gpus() or "quantization_config" not in config:
        return ["--model", str(checkpoint)]
    path = checkpoint.with_name(f"{checkpoint.name}-bf16")
    if not path.is_dir():
        partial = path.with_name(f".{path.name}-{os.getpid()}")
        with terminal.console.status(f"writing {path}"):
            write_dequantized(checkpoint, partial)
        partial.rename(path)
    return ["--model", str(path)]


def _measure(options: ServeBenchOptions, targets: list[_Target], terminal: Terminal, logs: Path) -> list[Round]:
    """Rounds in turns, the first to go changing with each; a round before them warms up and is thrown away."""
    rounds: list[Round] = []
    with terminal.progress("measuring", total=(options.rounds + 1) * len(targets)) as (bar, task):
        for round_idx in range(-1, options.rounds):
            for target in targets if round_idx % 2 else targets[::-1]:
                others = [other.server for other in targets if other is not target and other.server]
                measured = _round(options, target, others, round_idx, logs)
                bar.advance(task)
                if round_idx >= 0:
                    rounds.append(measured)
                    terminal.say(f"round {round_idx}: {target.name} {measured.served.output_tokens_per_s:.0f} tokens/s")
    return rounds


def _round(options: ServeBenchOptions, target: _Target, others: list[Server], round_idx: int, logs: Path) -> Round:
    """Every round has prompts of its own, the same for both servers."""
    load = Load(
        concurrency=options.concurrency,
        input_len=options.input_len,
        output_len=options.output_len,
        num_prompts=options.num_prompts,
        seed=options.seed + round_idx + 1,
    )
    server = target.server
    before = server.cpu_seconds() if server else {}
    tokens_before = server.generated_tokens() if server else 0
    idle_before, since = sum(sum(other.cpu_seconds().values()) for other in others), time.monotonic()
    name = f"{target.name}-{round_idx if round_idx >= 0 else 'warm-up'}"
    served = run_client(load, target.url, target.model, target.tokenizer, logs, name)
    idle = sum(sum(other.cpu_seconds().values()) for other in others) - idle_before
    idle_cores = idle / (time.monotonic() - since)
    per_1000: dict[str, float] = {}
    if server:
        tokens = server.generated_tokens() - tokens_before
        after = server.cpu_seconds()
        per_1000 = {label: (after[label] - before.get(label, 0.0)) / tokens * 1000 for label in after}
    return Round(target.name, round_idx, served, per_1000, idle_cores)


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
            output_tokens_per_s=median(lambda served: served.output_tokens_per_s),
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


def _ratio(rounds: Sequence[Round]) -> float:
    speed = {(r.server, r.round_idx): r.served.output_tokens_per_s for r in rounds}
    return statistics.median(speed["ep", i] / speed["native", i] for name, i in speed if name == "ep")


def _idle_cores(rounds: Sequence[Round], server: str) -> float:
    return statistics.median(r.idle_cores for r in rounds if r.server != server)


def _table(result: ServeBench) -> Table:
    options, at = result.options, result.conditions
    table = Table(
        title=f"{options.model}: {options.concurrency} concurrent, {options.input_len} + {options.output_len} tokens, "
        f"{options.num_prompts} requests, median of {options.rounds} rounds",
        caption=f"{at.cores} cores of {at.cpu}, load {at.load_1m:g} before; logs in {result.logs}",
    )
    table.add_column("")
    for name in result.servers:
        table.add_column(name, justify="right")
    compared = result.ratio is not None
    if compared:
        table.add_column("ep / native", justify="right")

    def row(label: str, values: Sequence[float], digits: int, ratio: float | None = None) -> None:
        cells = [f"{value:,.{digits}f}" for value in values]
        if compared:
            cells.append(f"{ratio if ratio is not None else values[0] / values[1]:.2f}")
        table.add_row(label, *cells)

    servers = list(result.servers.values())
    row("output tokens/s", [s.served.output_tokens_per_s for s in servers], 0, result.ratio)
    table.add_row("  slowest to fastest round", *(f"{s.slowest:,.0f} to {s.fastest:,.0f}" for s in servers))
    for name in ("ttft", "tpot", "itl"):
        for p in ("p50", "p90", "p99"):
            row(f"{name.upper()} {p}, ms", [getattr(getattr(s.served, f"{name}_ms"), p) for s in servers], 1)
    for label in sorted({label for s in servers for label, cpu_s in s.cpu_s_per_1000_tokens.items() if cpu_s >= 0.005}):
        values = (s.cpu_s_per_1000_tokens.get(label, 0.0) for s in servers)
        table.add_row(f"CPU s per 1000 tokens: {label}", *(f"{value:.2f}" if value else "" for value in values))
    totals = [sum(s.cpu_s_per_1000_tokens.values()) for s in servers]
    if all(totals):
        row("CPU s per 1000 tokens: all", totals, 2)
    if compared:
        table.add_row(
            "cores used while the other runs", *(f"{_idle_cores(result.rounds, n):.2f}" for n in result.servers)
        )
    return table

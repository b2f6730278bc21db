"""`ep bench serve`: throughput and latency of a server as clients see them, alone or beside native vLLM's.

Against native vLLM both servers stay up and take turns, so that the machine's drift meets both; what the idle one costs
meanwhile is measured and reported. What fits a machine only once is measured one by one.
"""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ep.bench.client import Load
from ep.bench.conditions import Conditions, conditions
from ep.bench.prompts import PromptFile, check_prompts
from ep.bench.result import publish
from ep.bench.rounds import Measured, measure
from ep.bench.sweep import Point, sweep
from ep.bench.targets import Wanted, targets_in_turn
from ep.errors import OptionError
from ep.terminal import Terminal, state_dir

OUTPUT_LEN = 128
"""Of random prompts, unless the user says otherwise."""


@dataclass(frozen=True)
class ServeBenchOptions:
    """Options of `ep bench serve`.

    url: measure this running server instead of starting one on a Ray of its own; `checkpoint` then names its tokenizer.
    layers: so many layers of the model's published shapes, with made weights, in place of the stand-in.
    against: "native" measures native vLLM on the same weights in the same run; None measures one server.
    concurrency, request_rate: the sweep, a list for one of them. prompts: a .jsonl file instead of random prompts of
    input_len tokens. num_prompts: of each round; None: by the point of the sweep, or all of the file's.
    ep_flags: further options of `ep serve`; native_flags of native vLLM; vllm_flags go to vLLM in both servers.
    one_by_one: native vLLM is started when ours has ended.
    """

    model: str = "deepseek-v3"
    url: str | None = None
    against: str | None = None
    checkpoint: str | None = None
    layers: int | None = None
    concurrency: tuple[int, ...] = ()
    request_rate: tuple[float, ...] = ()
    prompts: str | None = None
    input_len: int = 32
    output_len: int | None = None
    num_prompts: int | None = None
    rounds: int = 5
    seed: int = 0
    ready_s: float = 600.0
    output: str | None = None
    page: str | None = None
    ep_flags: tuple[str, ...] = ()
    native_flags: tuple[str, ...] = ()
    vllm_flags: tuple[str, ...] = ()
    one_by_one: bool = False


@dataclass(frozen=True)
class ServeBench:
    """start_s: of the servers that were started here. points: in the sweep's order. incomplete: why not everything was
    measured, None where it was."""

    conditions: Conditions
    options: ServeBenchOptions
    commands: dict[str, str]
    start_s: dict[str, float]
    points: tuple[Measured, ...]
    incomplete: str | None = None


def run(options: ServeBenchOptions, terminal: Terminal) -> ServeBench:
    """Starts the servers, measures them in turns and ends them. Raises OptionError, CheckpointError, EpError, and
    KeyboardInterrupt where that came before the first round ended."""
    prompts = _check(options)
    points = _points(options, prompts)
    at = conditions()
    logs = state_dir() / "logs" / f"bench-serve-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    logs.mkdir(parents=True)
    terminal.say(f"logs: {logs}")
    load = Load(None, options.input_len, options.output_len or OUTPUT_LEN, 0, options.seed, prompts=prompts)
    wanted = _wanted(options)
    with closing(targets_in_turn(wanted, terminal, logs)) as groups:
        measured = measure(points, load, options.rounds, groups, wanted.num_servers, terminal, logs)
    return ServeBench(
        conditions=at,
        options=options,
        commands={target.name: " ".join(target.server.command) for target in measured.targets if target.server},
        start_s={target.name: target.start_s for target in measured.targets if target.server},
        points=measured.points,
        incomplete=measured.incomplete,
    )


def show(result: ServeBench, console: Console) -> None:
    """The table, then one line of JSON last; the JSON also goes into options.output."""
    from ep.bench.serve_report import describe

    publish("serve", result, describe(result), console)


def _check(options: ServeBenchOptions) -> PromptFile | None:
    """The file of prompts, if there is one. Raises OptionError."""
    _wanted(options).check()
    for name in ("input_len", "output_len", "num_prompts", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if options.output is not None and not Path(options.output).resolve().parent.is_dir():
        raise OptionError(f"--output {options.output}: no such directory")
    return check_prompts(options.prompts, options.output_len) if options.prompts is not None else None


def _wanted(options: ServeBenchOptions) -> Wanted:
    return Wanted(
        options.model,
        options.checkpoint,
        options.url,
        options.against,
        options.ready_s,
        options.ep_flags,
        options.vllm_flags,
        options.layers,
        options.native_flags,
        options.one_by_one,
    )


def _points(options: ServeBenchOptions, prompts: PromptFile | None) -> tuple[Point, ...]:
    wanted = options.num_prompts
    if prompts is not None:
        wanted = prompts.num_prompts if wanted is None else wanted
        if wanted > prompts.num_prompts:
            raise OptionError(f"--num-prompts {wanted}: {options.prompts} holds {prompts.num_prompts}")
    return sweep(options.concurrency, options.request_rate, wanted)

"""`ep bench decode-latency`: how long a decode step of a fixed batch takes, by the length of the prompts, and what of
it is attention, gate, dispatch, experts and combine.

Latency is what a client sees of servers that run as always. Its parts come from a torch profile of the router, taken
afterwards: the profile gives shares of a step, which is somewhat longer while it is profiled.
"""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ep.bench.conditions import Conditions, conditions
from ep.bench.decode_stream import Batch, Decoded, decode
from ep.bench.profile import read_profile
from ep.bench.result import publish
from ep.bench.rounds import Spread, Target, spread
from ep.bench.step_parts import StepParts, join
from ep.bench.targets import Wanted, start_targets
from ep.devices import count_gpus
from ep.errors import EpError, OptionError
from ep.target import resolve_target
from ep.terminal import Terminal, state_dir
from ep.vllm_flags import KV_CACHE_BYTES

INPUT_LENS = (512, 1024, 2048)
PUBLISHED_BATCH, PUBLISHED_OUTPUT_LEN = 240, 200
"""Of the published observation for a model like Mixtral. On a CPU these take hours with a true model's shapes."""
CPU_BATCH, CPU_OUTPUT_LEN = 16, 64
_PROFILED_STEPS = 40
_BLOCK_TOKENS = 128


@dataclass(frozen=True)
class DecodeLatencyOptions:
    """Options of `ep bench decode-latency`. batch_size: requests that decode together. output_len: steps that are
    timed, from when all of them decode. None: as published on GPUs, less on CPUs. parts: also profile the router; None:
    on CPUs. layers: so many layers of the published shapes, with made weights, in place of the stand-in."""

    model: str = "deepseek-v3"
    checkpoint: str | None = None
    against: str | None = None
    batch_size: int | None = None
    input_len: tuple[int, ...] = INPUT_LENS
    output_len: int | None = None
    rounds: int = 5
    parts: bool | None = None
    layers: int | None = None
    seed: int = 0
    ready_s: float = 600.0
    output: str | None = None
    page: str | None = None
    ep_flags: tuple[str, ...] = ()
    native_flags: tuple[str, ...] = ()
    vllm_flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class DecodeRound:
    server: str
    round_idx: int
    decoded: Decoded


@dataclass(frozen=True)
class LatencyAt:
    """One input length. step_ms: by server, the median over rounds of the time between two tokens. profile: of our
    routers, as profiled; parts_ms: its shares of the unprofiled step_ms; both None where nothing was profiled. ratio:
    ep over native, of every round."""

    input_len: int
    rounds: tuple[DecodeRound, ...]
    step_ms: dict[str, Spread]
    ratio: Spread | None
    profile: StepParts | None
    parts_ms: dict[str, float] | None


@dataclass(frozen=True)
class DecodeLatency:
    """batch_size, output_len: those that were used."""

    conditions: Conditions
    options: DecodeLatencyOptions
    batch_size: int
    output_len: int
    commands: dict[str, str]
    lengths: tuple[LatencyAt, ...]


def run(options: DecodeLatencyOptions, terminal: Terminal) -> DecodeLatency:
    """Starts the servers, measures them in turns and ends them. Raises OptionError, CheckpointError, EpError."""
    on_gpu = bool(count_gpus())
    num_requests = options.batch_size or (PUBLISHED_BATCH if on_gpu else CPU_BATCH)
    output_len = options.output_len or (PUBLISHED_OUTPUT_LEN if on_gpu else CPU_OUTPUT_LEN)
    if options.output is not None and not Path(options.output).resolve().parent.is_dir():
        raise OptionError(f"--output {options.output}: no such directory")
    with_parts = not on_gpu if options.parts is None else options.parts
    at = conditions()
    logs = state_dir() / "logs" / f"bench-decode-latency-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    profiles = logs / "profiles"
    profiles.mkdir(parents=True)
    terminal.say(f"logs: {logs}")
    batches = [Batch(num_requests, input_len, output_len, options.seed) for input_len in options.input_len]
    stands_in = options.checkpoint is None
    target = resolve_target(options.model, options.checkpoint, stands_in, terminal, options.layers)
    flags = _vllm_flags(batches, target.checkpoint, profiles if with_parts else None, on_gpu)
    with ExitStack() as stack:
        wanted = Wanted(
            options.model,
            options.checkpoint,
            None,
            options.against,
            options.ready_s,
            options.ep_flags,
            (*flags, *options.vllm_flags),
            options.layers,
            options.native_flags,
        )
        targets = start_targets(wanted, terminal, logs, stack)
        rounds = _measure(batches, options.rounds, targets, terminal)
        profiled: list[StepParts | None] = [None] * len(batches)
        if with_parts:
            profiled = _profile_all(batches, targets[0], target.spec.num_moe_layers, profiles, terminal)
    return DecodeLatency(
        at,
        options,
        num_requests,
        output_len,
        {target.name: " ".join(target.server.command) for target in targets if target.server},
        tuple(_at(batch.input_len, of, parts) for batch, of, parts in zip(batches, rounds, profiled, strict=True)),
    )


def show(result: DecodeLatency, console: Console) -> None:
    """The table, then one line of JSON last; the JSON also goes into options.output."""
    from ep.bench.decode_report import describe

    publish("decode-latency", result, describe(result), console)


def _vllm_flags(batches: Sequence[Batch], checkpoint: Path, profiles: Path | None, on_gpu: bool) -> list[str]:
    """What the servers need for the batches to decode together, with their prompts in the prefix cache. A profiler that
    was not started costs nothing."""
    num_requests = batches[0].num_requests
    most = max(batch.input_len + batch.max_tokens for batch in batches)
    flags = ["--max-num-seqs", str(num_requests), "--max-model-len", str(most)]
    if not on_gpu and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        tokens = num_requests * (most + _BLOCK_TOKENS)
        needed = int(1.25 * tokens * _kv_bytes_per_token(checkpoint))
        flags += ["--kv-cache-memory-bytes", str(max(needed, KV_CACHE_BYTES))]
    if profiles is not None:
        config: dict[str, Any] = {"profiler": "torch", "torch_profiler_dir": str(profiles), "ignore_frontend": True}
        config |= {"torch_profiler_with_stack": False, "max_iterations": _PROFILED_STEPS}
        flags += ["--profiler-config", json.dumps(config)]
    return flags


def _kv_bytes_per_token(checkpoint: Path) -> int:
    """In bf16, over all layers."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if "kv_lora_rank" in config:
        values = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    else:
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        values = 2 * config["num_key_value_heads"] * head_dim
    return int(2 * values * config["num_hidden_layers"])


def _measure(
    batches: Sequence[Batch], num_rounds: int, targets: Sequence[Target], terminal: Terminal
) -> list[list[DecodeRound]]:
    """By batch. Every round goes through all lengths and, at each, through all servers, which take turns in going
    first; a round before them fills the prefix caches and is thrown away."""
    rounds: list[list[DecodeRound]] = [[] for _ in batches]
    with terminal.progress("measuring", total=(num_rounds + 1) * len(batches) * len(targets)) as (bar, task):
        for round_idx in range(-1, num_rounds):
            for batch, found in zip(batches, rounds, strict=True):
                for target in targets if round_idx % 2 else targets[::-1]:
                    decoded = decode(batch, target.url, target.model)
                    bar.advance(task)
                    if round_idx >= 0:
                        found.append(DecodeRound(target.name, round_idx, decoded))
                        terminal.say(
                            f"round {round_idx}, input {batch.input_len}: {target.name} {decoded.step_ms:.1f} ms a step"
                        )
    return rounds


def profile(batch: Batch, url: str, model: str, num_moe_layers: int, folder: Path) -> StepParts:
    """The parts of the steps of our routers at `url`, whose profilers write into `folder`. Raises EpError."""
    before = set(folder.glob("*.json*"))
    decode(batch, url, model, lambda: _post(url, "/start_profile"))
    _post(url, "/stop_profile")
    found = [read_profile(path, num_moe_layers) for path in sorted(folder.glob("*.json*")) if path not in before]
    seen = [one.num_requests for one in found]
    if sum(seen) != batch.num_requests:
        raise EpError(f"{folder}: the routers' profiles are of {seen} requests, expected {batch.num_requests} together")
    return join(found)


def _profile_all(
    batches: Sequence[Batch], target: Target, num_moe_layers: int, folder: Path, terminal: Terminal
) -> list[StepParts | None]:
    found: list[StepParts | None] = []
    with terminal.progress("profiling", total=len(batches)) as (bar, task):
        for batch in batches:
            found.append(profile(batch, target.url, target.model, num_moe_layers, folder))
            bar.advance(task)
    return found


def _post(url: str, path: str) -> None:
    request = urllib.request.Request(f"{url}{path}", data=b"", method="POST")
    try:
        urllib.request.urlopen(request, timeout=120.0).close()
    except OSError as error:
        raise EpError(f"{url}{path}: {error}") from error


def _at(input_len: int, rounds: Sequence[DecodeRound], profile: StepParts | None) -> LatencyAt:
    by_server: dict[str, list[float]] = {}
    for one in sorted(rounds, key=lambda one: (one.server != "ep", one.round_idx)):
        by_server.setdefault(one.server, []).append(one.decoded.step_ms)
    ratios = [ours / native for ours, native in zip(by_server["ep"], by_server.get("native", []))]
    step_ms = {server: spread(values) for server, values in by_server.items()}
    parts = None
    if profile is not None:
        scale = step_ms["ep"].median / profile.period_ms
        parts = {name: value * scale for name, value in profile.parts_ms.items()}
    return LatencyAt(input_len, tuple(rounds), step_ms, spread(ratios) if ratios else None, profile, parts)

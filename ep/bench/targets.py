"""The servers that a benchmark measures: one that runs, or ours started here, and native vLLM on the same weights."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ep.bench.rounds import Target
from ep.bench.server import EP_COMMAND, Server, answers, free_port, served_model
from ep.checkpoint import write_dequantized
from ep.devices import count_gpus
from ep.errors import OptionError
from ep.plugin import NATIVE_LOAD_FORMAT
from ep.terminal import Terminal
from ep.vllm_flags import KV_CACHE_BYTES

_NATIVE = (sys.executable, "-m", "ep.bench.native_server")
_MEMORY = "--gpu-memory-utilization"
_HALF = 0.45
"""Of a GPU's memory for each of two servers; vLLM's own default for one is 0.9."""


@dataclass(frozen=True)
class Wanted:
    """url: a server that runs, whose tokenizer `checkpoint` names; None: one is started on a Ray of its own. against:
    "native" or None. layers: so many of the published shapes, with made weights. ep_flags: further options of
    `ep serve`; native_flags of native vLLM; vllm_flags go to vLLM in every server started here. one_by_one: a server is
    started when the one before has ended."""

    model: str
    checkpoint: str | None
    url: str | None
    against: str | None
    ready_s: float
    ep_flags: tuple[str, ...] = ()
    vllm_flags: tuple[str, ...] = ()
    layers: int | None = None
    native_flags: tuple[str, ...] = ()
    one_by_one: bool = False

    @property
    def num_servers(self) -> int:
        """That are measured."""
        return 1 if self.against is None else 2

    def check(self) -> None:
        """Raises OptionError."""
        if self.against not in (None, "native"):
            raise OptionError(f"--against {self.against}: expected native")
        if self.native_flags and self.against is None:
            raise OptionError(f"--native-flags {self.native_flags[0]}: goes with --against native")
        if self.one_by_one and (self.url is not None or self.against is None):
            raise OptionError("--one-by-one: expected --against native, and no --url, whose server stays")
        if self.url is None:
            return
        if self.checkpoint is None:
            raise OptionError(f"--url {self.url}: --checkpoint DIR must name the served model's tokenizer")
        idle = [*self.ep_flags, *(self.vllm_flags if self.against is None else ())]
        if idle:
            raise OptionError(f"--url {self.url}: {idle[0]} is for a server that is started here")
        if not answers(self.url):
            raise OptionError(f"--url {self.url}: {self.url}/health does not answer")


def start_targets(wanted: Wanted, terminal: Terminal, logs: Path, stack: ExitStack) -> list[Target]:
    """The servers, up at the same time, ended with the stack where they are ours. On GPUs, where a start is minutes of
    compiling, they start together; else each answers before the next is started."""
    on_gpu = bool(count_gpus())
    if on_gpu:
        num_started = wanted.num_servers - (wanted.url is not None)
        wanted = replace(wanted, vllm_flags=(*wanted.vllm_flags, *memory_flags(wanted, num_started)))
    starter = _Starter(wanted, terminal, logs)
    commands = starter.commands().items()
    if on_gpu:
        servers = [starter.start(name, command, stack) for name, command in commands]
        return starter.running + [starter.wait(server) for server in servers]
    return starter.running + [starter.wait(starter.start(name, command, stack)) for name, command in commands]


def targets_in_turn(wanted: Wanted, terminal: Terminal, logs: Path) -> Generator[list[Target], None, None]:
    """Servers that are up at the same time, a list of them after the other; they have ended when the next one comes, or
    when this is closed."""
    if not wanted.one_by_one:
        with ExitStack() as stack:
            yield start_targets(wanted, terminal, logs, stack)
        return
    starter = _Starter(wanted, terminal, logs)
    for name, command in starter.commands().items():
        with ExitStack() as stack:
            yield [starter.wait(starter.start(name, command, stack))]


def memory_flags(wanted: Wanted, num_servers: int) -> tuple[str, ...]:
    """For vLLM in every server, where several share GPUs and the user says nothing of memory."""
    said = (*wanted.ep_flags, *wanted.native_flags, *wanted.vllm_flags)
    is_said = any(word.split("=")[0].replace("_", "-") == _MEMORY for word in said)
    return () if is_said or num_servers < 2 else (_MEMORY, str(_HALF))


class _Starter:
    """Of the servers of one benchmark. running: those that are not ours."""

    def __init__(self, wanted: Wanted, terminal: Terminal, logs: Path) -> None:
        from ep.target import resolve_target

        self._wanted, self._terminal, self._logs = wanted, terminal, logs
        self._target = resolve_target(
            wanted.model, wanted.checkpoint, wanted.checkpoint is None, terminal, wanted.layers
        )
        self._weights = str(self._target.checkpoint)
        self.running: list[Target] = []
        if wanted.url is not None:
            model = served_model(wanted.url, os.environ.get("EP_API_KEY"))
            self.running.append(Target("ep", wanted.url, model, self._weights))

    def commands(self) -> dict[str, tuple[list[str], list[str]]]:
        """Of the servers to be started: what comes before the address, and the flags for vLLM behind it."""
        wanted, target, weights = self._wanted, self._target, self._weights
        commands: dict[str, tuple[list[str], list[str]]] = {}
        if wanted.url is None:
            command = [*EP_COMMAND, wanted.model, "--checkpoint", weights, "--address", "local", "--verbose"]
            commands["ep"] = ([*command, *wanted.ep_flags], ["--", *wanted.vllm_flags])
        if wanted.against == "native":
            made = _made_weights(weights) if target.made else _native_weights(target.checkpoint, self._terminal)
            command = [*_NATIVE, *made, "--served-model-name", target.name]
            if not count_gpus() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
                command += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
            commands["native"] = (command, [*wanted.native_flags, *wanted.vllm_flags])
        return commands

    def start(self, name: str, command: tuple[list[str], list[str]], stack: ExitStack) -> Server:
        """Ended with the stack."""
        port, (before, behind) = free_port(), command
        server = Server(
            name,
            [*before, "--host", "127.0.0.1", "--port", str(port), *behind],
            f"http://127.0.0.1:{port}",
            self._logs / f"{name}.log",
        )
        stack.callback(server.stop)
        return server

    def wait(self, server: Server) -> Target:
        with self._terminal.console.status(f"starting {server.name}"):
            seconds = server.wait_until_ready(self._wanted.ready_s)
        self._terminal.say(f"{server.name} answers after {seconds:.1f} s")
        return Target(server.name, server.url, self._target.name, self._weights, server, seconds)


def _made_weights(checkpoint: str) -> list[str]:
    """Flags by which native vLLM makes the same weights as ep; on CPU in bf16, as it has no block FP8 there."""
    flags = ["--model", checkpoint, "--load-format", NATIVE_LOAD_FORMAT]
    return flags if count_gpus() else [*flags, "--hf-overrides", json.dumps({"quantization_config": None})]


def _native_weights(checkpoint: Path, terminal: Terminal) -> list[str]:
    """Flags for what native vLLM can load. It has no block FP8 on CPU: there the same weights in bf16, written beside
    these."""
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

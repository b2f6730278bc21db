"""The servers that a benchmark measures: one that runs, or ours started here, and native vLLM on the same weights."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Wanted:
    """url: a server that runs, whose tokenizer `checkpoint` names; None: one is started on a Ray of its own. against:
    "native" or None. layers: so many of the published shapes, with made weights. ep_flags: further options of
    `ep serve`; native_flags of native vLLM; vllm_flags go to vLLM in every server started here."""

    model: str
    checkpoint: str | None
    url: str | None
    against: str | None
    ready_s: float
    ep_flags: tuple[str, ...] = ()
    vllm_flags: tuple[str, ...] = ()
    layers: int | None = None
    native_flags: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises OptionError."""
        if self.against not in (None, "native"):
            raise OptionError(f"--against {self.against}: expected native")
        if self.native_flags and self.against is None:
            raise OptionError(f"--native-flags {self.native_flags[0]}: goes with --against native")
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
    """The servers, ended with the stack where they are ours. On GPUs, where a start is minutes of compiling, they start
    together; else each answers before the next is started."""
    from ep.target import resolve_target

    target = resolve_target(wanted.model, wanted.checkpoint, wanted.checkpoint is None, terminal, wanted.layers)
    weights = str(target.checkpoint)

    def start(name: str, command: Sequence[str], flags: Sequence[str]) -> Server:
        port = free_port()
        server = Server(
            name,
            [*command, "--host", "127.0.0.1", "--port", str(port), *flags],
            f"http://127.0.0.1:{port}",
            logs / f"{name}.log",
        )
        stack.callback(server.stop)
        return server

    def wait(server: Server) -> Target:
        with terminal.console.status(f"starting {server.name}"):
            seconds = server.wait_until_ready(wanted.ready_s)
        terminal.say(f"{server.name} answers after {seconds:.1f} s")
        return Target(server.name, server.url, target.name, weights, server, seconds)

    targets: list[Target] = []
    commands: dict[str, tuple[list[str], list[str]]] = {}
    if wanted.url is not None:
        targets.append(Target("ep", wanted.url, served_model(wanted.url, os.environ.get("EP_API_KEY")), weights))
    else:
        command = [*EP_COMMAND, wanted.model, "--checkpoint", weights, "--address", "local", "--verbose"]
        commands["ep"] = ([*command, *wanted.ep_flags], ["--", *wanted.vllm_flags])
    if wanted.against == "native":
        command = [*_NATIVE, *(_made_weights(weights) if target.made else _native_weights(target.checkpoint, terminal))]
        command += ["--served-model-name", target.name]
        if not count_gpus() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            command += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
        commands["native"] = (command, [*wanted.native_flags, *wanted.vllm_flags])
    if count_gpus():
        servers = [start(name, *command) for name, command in commands.items()]
        return targets + [wait(server) for server in servers]
    return targets + [wait(start(name, *command)) for name, command in commands.items()]


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

"""`ep serve` as a user starts it: a process of its own, watched from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_SCRIPT = Path(sys.executable).parent / "ep"
EP = [str(_SCRIPT)] if _SCRIPT.is_file() else [sys.executable, "-m", "ep"]
START_S = 180.0
EAGER = ("--", "--enforce-eager")
"""For tests that are not about what vLLM compiles, a quarter of a start."""
STOP_S = 30.0


@dataclass(frozen=True)
class Served:
    """A server that answers. base_url ends in /v1; output is what the terminal shows."""

    process: subprocess.Popen
    base_url: str
    output: Path
    environment: Mapping[str, str]
    start_s: float

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.base_url.removesuffix("/v1") + path, timeout=10) as response:
            return response.read().decode()

    @property
    def ray_address(self) -> str:
        """As the terminal tells it: other servers' clusters may run on this machine."""
        told = re.search(r"Ray( cluster)? at (\S+)", self.output.read_text())
        assert told is not None
        return told.group(2)

    def status(self) -> dict[str, Any]:
        """The one instance that `ep status --json` reports."""
        found = run_ep("status", "--json", "--address", self.ray_address, environment=self.environment)
        assert found.returncode == 0, found.stderr
        (instance,) = json.loads(found.stdout)
        return instance


@contextmanager
def serve(
    *arguments: str,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    signal_at_end: int = signal.SIGTERM,
    exit_code: int = 0,
    start_s: float = START_S,
) -> Iterator[Served]:
    """`ep serve *arguments` on a free port, until the block ends; then nothing that it started may be left.

    exit_code: another than 0 where what the block did last makes the server end by itself.
    """
    port = free_port()
    output = folder / f"serve-{port}.txt"
    env = ep_environment(environment)
    start = time.monotonic()
    split = arguments.index("--") if "--" in arguments else len(arguments)
    command = [*EP, "serve", *arguments[:split], "--port", str(port), *arguments[split:]]
    with output.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=env)
    seen: set[psutil.Process] = set()
    try:
        while not (_healthy(port) and "serving " in output.read_text()):
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < start + start_s, output.read_text()
            time.sleep(0.2)
        yield Served(process, f"http://127.0.0.1:{port}/v1", output, env, time.monotonic() - start)
        if exit_code == 0:
            assert process.poll() is None, output.read_text()
        else:
            seen.update(_descendants(process.pid))
            process.wait(STOP_S)
    finally:
        if process.poll() is None:
            seen.update(_descendants(process.pid))
            process.send_signal(signal_at_end)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        _, alive = psutil.wait_procs(seen, timeout=5.0)
        for left in alive:
            left.kill()
    assert not alive, f"left behind: {alive}"
    assert process.returncode == exit_code, output.read_text()


def run_ep(
    *arguments: str, environment: Mapping[str, str] | None = None, timeout_s: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Run an `ep` command to its end."""
    return subprocess.run(
        [*EP, *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=ep_environment(environment),
        timeout=timeout_s,
    )


def ep_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "COLUMNS": "200"} | dict(extra or {})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1.0) as response:
            return response.status == 200
    except OSError:
        return False


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []

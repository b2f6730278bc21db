"""A server under measurement: a process of our own with everything it starts, its log, its CPU time and its end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path

import psutil

from ep.errors import EpError, OptionError

_STOP_SECONDS = 30.0
_GENERATED = re.compile(r"^vllm:generation_tokens_total\{.*\} (\S+)$", re.MULTILINE)
_ERROR = re.compile(r"ep: |([A-Za-z_]\w*\.)*\w*(Error|Exception)(: |$)")

EP_COMMAND = (sys.executable, "-c", "from ep.cli import main; main()", "serve")


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class Server:
    """An OpenAI server started with `command`; both its outputs go to `log`. Ended by `stop`, with all it started."""

    def __init__(self, name: str, command: Sequence[str], url: str, log: Path, env: Mapping[str, str] | None = None):
        self.name, self.command, self.url, self.log = name, tuple(command), url, log
        with log.open("wb") as out:
            self._process = psutil.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        self._seen: dict[int, psutil.Process] = {self._process.pid: self._process}
        self._since = time.monotonic()

    def wait_until_ready(self, timeout_s: float) -> float:
        """Seconds from the start until /health answered. Raises EpError when the process ends, with the error that it
        named last, or when time is up."""
        while not answers(self.url):
            if self._process.poll() is not None:
                raise EpError(
                    f"{self.log}: {self.name} ended with exit code {self._process.returncode}: {last_words(self.log)}"
                )
            if time.monotonic() - self._since > timeout_s:
                raise EpError(f"{self.log}: {self.name} did not answer {self.url}/health within {timeout_s:g} s")
            time.sleep(0.25)
        return time.monotonic() - self._since

    def cpu_seconds(self) -> dict[str, float]:
        """User and system seconds so far, by kind of process. Actors of a cluster that it joined are not among them."""
        seconds: dict[str, float] = {}
        for process in self.processes():
            try:
                times, label = process.cpu_times(), self.label(process)
            except psutil.Error:
                continue
            seconds[label] = seconds.get(label, 0.0) + times.user + times.system
        return seconds

    def generated_tokens(self) -> int:
        """Output tokens so far, from the server's own counter."""
        return generated_tokens(self.url)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for what is left after 30 s. Returns when all of its processes are gone."""
        self.processes()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(self._seen.values(), timeout=_STOP_SECONDS)
        for process in alive:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(alive, timeout=5.0)

    def processes(self) -> list[psutil.Process]:
        """This one and all that it started, now."""
        try:
            children = self._process.children(recursive=True)
        except psutil.NoSuchProcess:
            children = []
        self._seen.update((child.pid, child) for child in children)
        return [self._process, *children]

    def label(self, process: psutil.Process) -> str:
        """What kind of process it is, in a word."""
        if process.pid == self._process.pid:
            return "API server"
        title = (process.cmdline() or [process.name()])[0]
        if not title.startswith(("VLLM::", "ray::")):
            scripts = [Path(word).stem for word in process.cmdline() if word.endswith(".py")]
            return scripts[0] if scripts else process.name()
        return re.split(r"[.\s\d]", title.split("::", 1)[1])[0]


def last_words(log: Path) -> str:
    """The last line that names an error, as Python and `ep` name theirs; else the last one. Behind an error there
    may be many lines of what else ended."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or ["it printed nothing"])[-1]


def answers(url: str) -> bool:
    """Whether the server's /health says 200."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError, HTTPException):
        return False


def served_model(url: str, key: str | None = None) -> str:
    """The first name under which the server serves its model. Raises OptionError where it refuses the key."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{url}/v1/models", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10.0) as response:
            return str(json.load(response)["data"][0]["id"])
    except urllib.error.HTTPError as error:
        raise OptionError(f"--url {url}: /v1/models answers {error.code}; EP_API_KEY is the key it gets") from error


def generated_tokens(url: str) -> int:
    """Output tokens since the server's start, over all its engines."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10.0) as response:
        return int(sum(float(value) for value in _GENERATED.findall(response.read().decode())))

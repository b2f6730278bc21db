"""A server under measurement is started, watched and ended with all that it started."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from ep.bench.server import Server, free_port, last_words
from ep.errors import EpError

# A server with a child that ignores SIGTERM, and a token counter as vLLM prints it.
_SERVER = """
import subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
child.stdout.readline()
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        counters = "".join(f'vllm:generation_tokens_total{{engine="{i}"}} {20 + i}.0\\n' for i in range(2))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(counters.encode())
    def log_message(self, *args):
        pass
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def start(code: str, log: Path) -> Server:
    port = free_port()
    return Server("it", [sys.executable, "-c", code, str(port)], f"http://127.0.0.1:{port}", log)


def test_a_server_ends_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ep.bench.server._STOP_SECONDS", 0.5)
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    server = start(_SERVER, tmp_path / "log")
    try:
        assert server.wait_until_ready(30.0) > 0
        assert server.generated_tokens() == 41
        assert server.cpu_seconds()["API server"] > 0
        started = {process.pid for process in psutil.Process().children(recursive=True)} - before
        assert len(started) == 2
    finally:
        server.stop()
    deadline = time.monotonic() + 5
    while any(psutil.pid_exists(pid) for pid in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in started if psutil.pid_exists(pid)]


def test_a_server_that_does_not_start_is_named_with_its_last_words(tmp_path: Path) -> None:
    server = start("import sys; sys.exit('no such model')", tmp_path / "log")
    with pytest.raises(EpError, match="exit code 1: no such model") as error:
        server.wait_until_ready(30.0)
    assert str(tmp_path / "log") in str(error.value)
    server.stop()


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("", "it printed nothing"),
        ("\nstarting\n\n", "starting"),
        ("ValueError: early\n  File x\nray.exceptions.RayError: a\nwarnings.warn('b')\n", "ray.exceptions.RayError: a"),
        ("Traceback\n    raise NotImplementedError\nNotImplementedError\nprocess 3 ended\n", "NotImplementedError"),
        ("INFO 1\nep: /models: no such directory\nbye\n", "ep: /models: no such directory"),
        ("an Error: in the midst of a line\nErrors: 3\nlast\n", "last"),
    ],
)  # fmt: skip
def test_the_last_error_is_told_whatever_follows_it(written: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(written)
    assert last_words(tmp_path / "log") == words

"""Which servers a benchmark starts, when, and with which flags; small servers stand in for ep and vLLM."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from ep.bench import targets
from ep.bench.server import answers
from ep.bench.targets import Wanted, memory_flags, targets_in_turn
from ep.errors import OptionError
from ep.terminal import Terminal

_SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
WANTED = Wanted("deepseek-v3", None, None, "native", 30.0, ("--shards", "2"), ("--max-model-len", "64"))


@pytest.fixture(autouse=True)
def small_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "server.py"
    script.write_text(_SERVER)
    monkeypatch.setattr(targets, "EP_COMMAND", (sys.executable, str(script)))
    monkeypatch.setattr(targets, "_NATIVE", (sys.executable, str(script)))


@pytest.mark.parametrize("one_by_one", [False, True])
def test_servers_are_up_together_or_one_by_one_and_end(one_by_one: bool, tmp_path: Path) -> None:
    seen: dict[str, tuple[str, ...]] = {}
    wanted = replace(WANTED, one_by_one=one_by_one, native_flags=("--enforce-eager",))
    wanted.check()
    urls: list[str] = []
    with closing(targets_in_turn(wanted, Terminal(False), tmp_path)) as groups:
        for group in groups:
            assert [target.name for target in group] == ["ep", "native"][len(urls) :][: 1 if one_by_one else 2]
            assert not any(map(answers, urls)) and all(answers(target.url) for target in group)
            urls += [target.url for target in group]
            seen |= {target.name: target.server.command for target in group if target.server is not None}
    assert len(urls) == 2 and not any(map(answers, urls))
    ours, theirs = seen["ep"], seen["native"]
    assert ours[-3:] == ("--", "--max-model-len", "64") and ours[ours.index("--shards") + 1] == "2"
    assert theirs[-3:] == ("--enforce-eager", "--max-model-len", "64") and "--shards" not in theirs


def test_whoever_stops_in_the_midst_leaves_no_server(tmp_path: Path) -> None:
    with closing(targets_in_turn(replace(WANTED, one_by_one=True), Terminal(False), tmp_path)) as groups:
        (target,) = next(groups)
        assert answers(target.url)
    assert not answers(target.url)


def test_servers_that_share_gpus_have_half_of_their_memory_each_unless_told() -> None:
    assert memory_flags(WANTED, 2) == ("--gpu-memory-utilization", "0.45")
    assert memory_flags(WANTED, 1) == ()
    for said in (("--gpu-memory-utilization", "0.3"), ("--gpu_memory_utilization=0.3",)):
        assert memory_flags(replace(WANTED, vllm_flags=said), 2) == ()
        assert memory_flags(replace(WANTED, native_flags=said), 2) == ()


@pytest.mark.parametrize("wanted", [replace(WANTED, against=None), replace(WANTED, url="http://127.0.0.1:9")])
def test_one_by_one_needs_two_servers_of_its_own(wanted: Wanted) -> None:
    with pytest.raises(OptionError, match="--one-by-one: expected --against native, and no --url"):
        replace(wanted, one_by_one=True).check()

"""Experts that move between the shards of a running server, under streams."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from ep.bench.streams import Stream, StreamLoad, run_streams
from ep.instances import coordinators
from ep.trace import read_trace
from tests.serving.served import EAGER, Served, run_ep, serve

pytestmark = pytest.mark.serving
MODEL = "deepseek-v3"
LOAD = StreamLoad(num_prompts=32, concurrency=16, input_len=24, output_len=96)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("rebalance")
    flags = ("--synthetic", "--address", "local", "--shards", "4", "--redundant", "8", "--rebalance-interval", "1")
    with serve(MODEL, *flags, "--trace", str(folder / "load.trace"), *EAGER, folder=folder) as served:
        assert not served.status()["rebalances"].get("failed")  # while it started there was nothing to fail
        assert not rebalance(served, "--no-auto")["auto_rebalance"]
        yield served


def streams(server: Served) -> list[Stream]:
    return run_streams(LOAD, server.base_url.removesuffix("/v1"), MODEL)


def rebalance(server: Served, *flags: str) -> dict[str, Any]:
    done = run_ep("rebalance", "--json", "--address", server.ray_address, *flags, environment=server.environment)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def check(found: list[Stream], wanted: list[Stream]) -> None:
    assert not [stream.error for stream in found if stream.error]
    assert [stream.text for stream in found] == [stream.text for stream in wanted]


def test_a_shard_killed_in_the_middle_of_a_move(server: Served) -> None:
    """Tokens computed with another expert's weights would give another text."""
    wanted = streams(server)
    victim = server.status()["shards"][2]["pid"]
    with coordinators(server.ray_address) as found, ThreadPoolExecutor(1) as pool:
        (coordinator,) = found.values()
        before = ray.get(coordinator.status.remote())["generation"]
        running = pool.submit(streams, server)
        moving = coordinator.rebalance.remote(True)
        while ray.get(coordinator.status.remote())["coming_generation"] is None:
            assert not ray.wait([moving], timeout=0)[0], ray.get(moving)
        os.kill(victim, signal.SIGKILL)
        outcome = ray.get(moving)
        check(running.result(), wanted)
        assert outcome.outcome == "failed" and "goes on serving" in outcome.reason
        assert before <= outcome.generation == ray.get(coordinator.status.remote())["generation"]
        deadline = time.monotonic() + 60
        while ray.get(coordinator.status.remote())["shards"][2]["state"] != "up":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        check(streams(server), wanted)


def test_streams_do_not_notice_an_automatic_move(server: Served) -> None:
    wanted = streams(server)
    check(wanted, wanted)
    assert rebalance(server, "--auto")["auto_rebalance"]
    deadline = time.monotonic() + 90
    while not server.status()["rebalances"].get("moved"):
        assert time.monotonic() < deadline, server.status()["last_rebalance"]
        check(streams(server), wanted)
    assert not rebalance(server, "--no-auto")["auto_rebalance"]
    status = server.status()
    outcome = status["last_rebalance"]
    assert not status["auto_rebalance"] and status["generation"] > 0
    assert {shard["generation"] for shard in status["shards"]} == {status["generation"]}
    assert outcome["excess_after"] < 0.05
    check(streams(server), wanted)
    assert "ep_rebalances_total" in server.get("/metrics")


def test_what_does_not_pay_back_is_refused(server: Served) -> None:
    generation = server.status()["generation"]
    outcome = rebalance(server)
    assert outcome["outcome"] in ("refused", "nothing"), outcome
    assert server.status()["generation"] == generation


def test_the_trace_and_its_report_tell_of_the_moves(server: Served, tmp_path: Path) -> None:
    page = tmp_path / "live.html"
    live = run_ep(
        "report", "--live", "--json", "--html", str(page), "--address", server.ray_address,
        environment=server.environment,
    )  # fmt: skip
    assert live.returncode == 0, live.stderr
    assert json.loads(live.stdout) and page.stat().st_size > 1_000_000
    trace = read_trace(server.output.parent / "load.trace")
    status = server.status()
    assert [change.new_generation for change in trace.changes][-1] == status["generation"]
    assert all(change.moved_bytes > 0 for change in trace.changes[:1])

"""What `ep bench nodes` makes of traces and runs; the runs themselves are in tests/serving."""

from __future__ import annotations

import dataclasses
import json

import pytest
from click.testing import CliRunner
from rich.console import Console

from ep.bench.client import Percentiles, Served
from ep.bench.conditions import Conditions
from ep.bench.hosts.loss import HostLoss
from ep.bench.links import traffic
from ep.bench.nodes import NodesBench, NodesBenchOptions, NodesPoint, run
from ep.bench.nodes_report import describe
from ep.bench.page import Page, render
from ep.bench.result import publish
from ep.cli import cli
from ep.errors import OptionError
from ep.terminal import Terminal
from tests.traces import make_trace

AT = Conditions("2026-11-23T12:00:00+00:00", "Some CPU", 2, 24.0, "6.1", 0.5, "3.11.7", {"ep-serve": "0.1.0"}, "abc")
LOST = "host 198.18.0.11 was lost (does not answer), shards 1 with it; 3 requests failed"


def served(speed: float, num_failed: int = 0) -> Served:
    times = Percentiles(10.0, 20.0, 30.0)
    return Served(1.0, speed / 64, speed, 1.5 * speed, times, times, times, num_failed)


def bench(incomplete: str | None = None) -> NodesBench:
    """One node, then two, the second of which may have been lost."""
    trace = make_trace()
    figures, links = traffic(trace, since=0.0)
    one = NodesPoint(1, 4, 30.0, (served(90), served(110)), 100.0, 90.0, 110.0, 1.0, 0, 0, figures, links, None)
    failed = 3 if incomplete else 0
    two = NodesPoint(2, 8, 31.0, (served(80, failed),), 80.0, 80.0, 80.0, 0.4, failed, 0, figures, links, incomplete)
    loss = HostLoss("198.18.0.11", 6.5, LOST, "shard 1: host 198.18.0.11 is lost") if incomplete else None
    options = NodesBenchOptions(nodes=(1, 2), delay_ms=5.0, loss=0.01)
    slow = ("node-1", options.quality.describe())
    return NodesBench(AT, options, "2 hosts: some", "namespaces", slow, "logs", (one, two), loss, incomplete)


@pytest.mark.parametrize("first", [0, 2])
def test_traffic_is_of_the_windows_since_then(first: int) -> None:
    trace = make_trace()
    windows = trace.windows[first:]
    figures, links = traffic(trace, since=windows[0].start)
    assert figures is not None
    tokens = sum(window.num_prefill_tokens + window.num_decode_tokens for window in windows)
    assert figures.tokens == tokens
    for link in links:
        of = [window.links[link.shard] for window in windows]
        num_bytes = sum(one.bytes_out + one.bytes_in for one in of)
        assert link.bytes_per_token == pytest.approx(num_bytes / tokens, abs=0.1)
        assert link.requests == sum(one.requests for one in of)
        assert link.round_trip_us_p50 <= link.round_trip_us_p99
        assert link.is_near == (trace.header.node_of_shard[link.shard] in trace.header.node_of_router)
    assert figures.bytes_per_token == pytest.approx(sum(link.bytes_per_token for link in links), abs=0.5)
    far = sum(link.bytes_per_token for link in links if not link.is_near)
    assert 0 < far < figures.bytes_per_token and figures.between_nodes == pytest.approx(far, abs=0.5)


def test_nothing_was_served_since_then() -> None:
    assert traffic(make_trace(), since=4e9) == (None, ())


def test_a_complete_run() -> None:
    report = describe(bench())
    text = render(Page("nodes", "ep bench nodes", AT, report), "page")
    assert "ncomplete" not in text and "INCOMPLETE" not in text
    for part in ("node-1 (slowed)", "5 ms delay, 1.0% loss", "nothing about how real hosts scale", "| 2 | 8 | 80 |"):
        assert part in text


def test_an_incomplete_run_says_so_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    result = bench(LOST)
    report = describe(result)
    text = render(Page("nodes", "ep bench nodes", AT, report), "page")
    assert text.count(LOST) >= 2 and "| 2 (incomplete) |" in text
    assert "named it 6.5 s later" in text and "shard 1: host 198.18.0.11 is lost" in text
    publish("nodes", result, report, Console(width=80))
    *table, last = capsys.readouterr().out.splitlines()
    assert any("INCOMPLETE: host 198.18.0.11 was lost" in line for line in table)
    assert all(len(line) <= 80 for line in table)
    found = json.loads(last)
    assert found["incomplete"] == LOST and found["points"][1]["num_failed"] == 3
    assert found["points"][0]["incomplete"] is None and found["loss"]["named_s"] == 6.5


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"address": "10.0.0.1:6379", "delay_ms": 5.0}, "cannot be slowed or cut"),
        ({"address": "10.0.0.1:6379", "lose_host_after_s": 1.0}, "cannot be slowed or cut"),
        ({"slow_host": 4, "delay_ms": 1.0}, "hosts are numbered 0 to 3"),
        ({"slow_host": 1}, "--delay-ms"),
        ({"nodes": (4, 2), "lose_host_after_s": 1.0}, "the last number must be the largest"),
        ({"output": "/no/such/folder/x.json"}, "no such directory"),
    ],
)
def test_options_that_cannot_be(changed: dict[str, object], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        run(dataclasses.replace(NodesBenchOptions(), **changed), Terminal())  # type: ignore[arg-type]


def test_the_command_line_refuses_what_is_no_number_of_nodes() -> None:
    for wrong in ("0", "1,1", "two", "1,,2"):
        done = CliRunner().invoke(cli, ["bench", "nodes", "--nodes", wrong])
        assert done.exit_code == 2 and "--nodes" in done.output, done.output

"""The numbers of a report beside plain loops that compute the same, the command around them, and what it refuses."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ep import cli
from ep.errors import TraceError
from ep.load import ROUND_TRIP_BOUNDS_US, round_trip_histogram
from ep.placement import EMPTY, Placement
from ep.report import units
from ep.report.compare import compare
from ep.report.html import render
from ep.report.numbers import ReportNumbers, ReportOptions, plain, report_numbers
from ep.report.pages import report_page
from ep.report.served import link_bytes
from ep.report.sheets import headline
from ep.report.terminal import show
from ep.trace import Trace, read_trace
from ep.trace_header import TraceHeader, encode_header
from tests.traces import SMALL, TraceCase, make_trace, write_trace

ROOT = Path(__file__).parents[2]


@cache
def small() -> Trace:
    return make_trace(SMALL)


@cache
def small_numbers() -> ReportNumbers:
    return report_numbers(small(), ReportOptions())


@cache
def document() -> dict[str, Any]:
    """As a reader of the JSON has it."""
    return json.loads(json.dumps(plain(small_numbers()), allow_nan=False))


def loads_by_hand(placement: Placement, counts: np.ndarray) -> list[list[float]]:
    """[L][S], slot by slot."""
    layers = []
    for layer, slots in enumerate(placement.slots.tolist()):
        replicas = [sum(shard.count(expert) for shard in slots) for expert in range(placement.num_experts)]
        layers.append([sum(counts[layer][e] / replicas[e] for e in shard if e != EMPTY) for shard in slots])
    return layers


def measures_by_hand(loads: list[list[float]]) -> tuple[float, float]:
    """Means over layers of (max - mean) / mean and of mean / max."""
    pairs = [(max(shards), sum(shards) / len(shards)) for shards in loads]
    return (
        sum((most - mean) / mean for most, mean in pairs) / len(pairs),
        sum(mean / most for most, mean in pairs) / len(pairs),
    )


@pytest.mark.parametrize("phase", ["prefill", "decode", "all"])
def test_imbalance_as_served(phase: str) -> None:
    trace = small()
    total = [[0.0] * trace.header.placement.num_shards for _ in range(trace.header.spec.num_moe_layers)]
    tokens = pairs = 0
    for window in trace.windows:
        counts = {"prefill": window.prefill, "decode": window.decode, "all": window.prefill + window.decode}[phase]
        placement = trace.header.placement if window.generation == 0 else trace.changes[0].placement
        for row, more in zip(total, loads_by_hand(placement, counts), strict=True):
            row[:] = [one + other for one, other in zip(row, more, strict=True)]
        tokens += window.num_prefill_tokens * (phase != "decode") + window.num_decode_tokens * (phase != "prefill")
        pairs += int(counts.sum())
    (found,) = (row for row in document()["phases"] if row["phase"] == phase)
    excess, evenness = measures_by_hand(total)
    assert found["excess"] == pytest.approx(excess, rel=1e-5) and found["evenness"] == pytest.approx(evenness, rel=1e-5)
    assert (found["tokens"], found["pairs"]) == (tokens, pairs)
    by_layer = [measures_by_hand([layer])[0] for layer in total]
    assert found["busiest_layer"] == trace.header.spec.moe_layers[by_layer.index(max(by_layer))]
    if phase == "all":
        layers = document()["layers"]
        assert [row["excess"] for row in layers] == pytest.approx(by_layer, rel=1e-5)
        assert [row["busiest_shard"] for row in layers] == [row.index(max(row)) for row in total]
        sums = [sum(row[shard] for row in total) for shard in range(len(total[0]))]
        mean = sum(sums) / len(sums)
        assert [row["load"] for row in document()["shards"]] == pytest.approx([s / mean for s in sums], rel=1e-5)
        assert sum(row["busiest_layers"] for row in document()["shards"]) == len(total)


def test_placements_on_all_load() -> None:
    trace, found = small(), {row["name"]: row for row in document()["plans"]["placements"]}
    counts = sum(window.prefill + window.decode for window in trace.windows)
    assert isinstance(counts, np.ndarray)
    planned = small_numbers().plans.planned
    placements = {"first": trace.header.placement, "current": trace.changes[0].placement, "plan": planned}
    for name, placement in placements.items():
        excess, evenness = measures_by_hand(loads_by_hand(placement, counts))
        assert found[name]["excess"] == pytest.approx(excess, rel=1e-5, abs=1e-9)
        assert found[name]["evenness"] == pytest.approx(evenness, rel=1e-5)
        assert found[name]["num_redundant"] == (placement.slots[0] != EMPTY).sum() - placement.num_experts
        assert found[name]["generation"] == placement.generation
    moves = 0
    for before, after in zip(trace.changes[0].placement.slots.tolist(), planned.slots.tolist(), strict=True):
        moves += sum(len(set(new) - set(old) - {EMPTY}) for old, new in zip(before, after, strict=True))
    assert found["plan"]["moves"] == moves
    assert found["plan"]["moved_bytes"] == moves * trace.header.spec.expert_bytes
    assert found["plan"]["excess"] <= found["current"]["excess"] <= found["first"]["excess"]
    bounds = document()["plans"]["bounds"]
    assert bounds["excess"] <= found["plan"]["excess"] + 1e-9
    assert bounds["at_will_excess"] <= found["plan"]["excess"] + 1e-9
    np.testing.assert_allclose(
        document()["plans"]["current_load"], loads_by_hand(placements["current"], counts), rtol=1e-5
    )
    np.testing.assert_allclose(document()["plans"]["planned_load"], loads_by_hand(planned, counts), rtol=1e-5)


def test_hottest_experts() -> None:
    trace, spec = small(), small().header.spec
    cells = {}
    for layer_pos, layer in enumerate(spec.moe_layers):
        for expert in range(spec.num_experts):
            cells[layer, expert] = [
                sum(int(getattr(w, p)[layer_pos, expert]) for w in trace.windows) for p in ("prefill", "decode")
            ]
    ranked = sorted(cells, key=lambda cell: (-sum(cells[cell]), cell))[:20]
    found = document()["hottest"]
    assert [(row["layer"], row["expert"]) for row in found] == ranked
    for row in found:
        prefill, decode = cells[row["layer"], row["expert"]]
        of_layer = sum(sum(value) for cell, value in cells.items() if cell[0] == row["layer"])
        assert (row["prefill_pairs"], row["decode_pairs"], row["pairs"]) == (prefill, decode, prefill + decode)
        assert row["share"] == pytest.approx((prefill + decode) / of_layer, rel=1e-5)
        assert row["load"] == pytest.approx((prefill + decode) / (of_layer / spec.num_experts), rel=1e-5)
        slots = trace.changes[0].placement.slots[spec.moe_layers.index(row["layer"])]
        assert row["shards"] == [shard for shard, held in enumerate(slots) if row["expert"] in held]
    assert document()["prefill"] == sum(window.prefill for window in trace.windows).tolist()
    assert document()["decode"] == sum(window.decode for window in trace.windows).tolist()


def test_shards_and_links() -> None:
    trace = small()
    for shard_idx, row in enumerate(document()["shards"]):
        links = [window.links[shard_idx] for window in trace.windows]
        for name in ("tokens", "pairs", "requests", "bytes_out", "bytes_in"):
            assert row[name] == sum(getattr(link, name) for link in links)
        assert row["compute_us"] == pytest.approx(
            sum(link.compute_ns for link in links) / row["requests"] / 1e3, rel=1e-5
        )
        histogram = sum(link.round_trips for link in links)
        for quantile, name in ((0.5, "round_trip_us_p50"), (0.99, "round_trip_us_p99")):
            bucket = next(i for i in range(len(histogram)) if histogram[: i + 1].sum() >= quantile * histogram.sum())
            assert ROUND_TRIP_BOUNDS_US[bucket - 1] * 0.999 <= row[name] <= ROUND_TRIP_BOUNDS_US[bucket] * 1.001
        assert row["node"] == trace.header.node_of_shard[shard_idx]
    links_found = document()["links"]
    assert links_found["bytes_out"] == [[row["bytes_out"] for row in document()["shards"]]]
    assert links_found["bytes_in"] == [[row["bytes_in"] for row in document()["shards"]]]
    total = [row["bytes_out"] + row["bytes_in"] for row in document()["shards"]]
    assert links_found["between_nodes"] == pytest.approx(sum(total[2:]) / sum(total), rel=1e-5)


def test_the_slowest_link_stands_on_top() -> None:
    windows = list(small().windows)
    for place, window in enumerate(windows):
        slow = replace(window.links[2], round_trips=round_trip_histogram([20_000.0] * window.links[2].requests))
        windows[place] = replace(window, links=(*window.links[:2], slow, *window.links[3:]))
    trace = replace(small(), windows=tuple(windows))
    (found,) = (line for line in headline(report_numbers(trace, ReportOptions())) if line[0] == "slowest link")
    assert found[1] == f"shard 2 on {trace.header.node_of_shard[2]}"
    p50 = int(re.search(r"p50 ([\d,]+) µs", found[2])[1].replace(",", ""))  # type: ignore[index]
    assert p50 == pytest.approx(20_000, rel=0.1)


def test_links_of_routers_on_two_nodes() -> None:
    header = replace(small().header, node_of_router=("node-1", "node-0", "node-1"))
    windows = tuple(replace(window, router=idx % 3) for idx, window in enumerate(small().windows))
    found = link_bytes(replace(small(), header=header, windows=windows))
    expected = {"node-0": [0] * 4, "node-1": [0] * 4}
    apart = total = 0
    for idx, window in enumerate(small().windows):
        node = ("node-1", "node-0", "node-1")[idx % 3]
        for shard, link in enumerate(window.links):
            expected[node][shard] += link.bytes_out
            total += link.bytes_out + link.bytes_in
            apart += (link.bytes_out + link.bytes_in) * (header.node_of_shard[shard] != node)
    assert found.router_nodes == ("node-0", "node-1")
    assert found.bytes_out.tolist() == [expected["node-0"], expected["node-1"]]
    assert found.between_nodes == pytest.approx(apart / total)


def test_lift_of_experts_chosen_together() -> None:
    trace = small()
    tokens = [set(token[1].tolist()) for window in trace.windows for token in window.sampled_ids]
    layer = document()["coactivation"][1]
    assert layer["num_tokens"] == len(tokens) and layer["layer"] == trace.header.spec.moe_layers[1]
    counts = sum(window.prefill[1] + window.decode[1] for window in trace.windows)
    assert isinstance(counts, np.ndarray)
    assert layer["experts"] == sorted(range(len(counts)), key=lambda expert: (-counts[expert], expert))[:16]
    finite = 0
    for i, one in enumerate(layer["experts"]):
        for j, other in enumerate(layer["experts"]):
            alone = [sum(expert in token for token in tokens) / len(tokens) for expert in (one, other)]
            both = sum({one, other} <= token for token in tokens)
            assert layer["together"][i][j] == both
            if i == j or not all(alone):
                assert layer["lift"][i][j] is None
            else:
                assert layer["lift"][i][j] == pytest.approx(both / len(tokens) / math.prod(alone), rel=1e-5)
                finite += 1
    assert finite > 50


def test_time_and_changes() -> None:
    trace, points = small(), document()["timeline"]
    assert [point["start"] for point in points] == [SMALL.window_s * i for i in range(SMALL.num_windows)]
    window = trace.windows[4]
    excess, _evenness = measures_by_hand(loads_by_hand(trace.changes[0].placement, window.decode))
    assert points[4]["decode_excess"] == pytest.approx(excess, rel=1e-5) and points[4]["generation"] == 1
    (change,) = document()["changes"]
    assert change["start"] == SMALL.window_s * 3 and (change["old_generation"], change["new_generation"]) == (0, 1)
    before = sum(window.prefill + window.decode for window in trace.windows[:3])
    assert isinstance(before, np.ndarray)
    excess, _evenness = measures_by_hand(loads_by_hand(trace.header.placement, before))
    assert change["excess_before"] == pytest.approx(excess, rel=1e-5)


def test_what_if_memory_in_tokens_of_kv_cache() -> None:
    spec, rows = small().header.spec, document()["what_if"]
    assert len({(row["num_shards"], row["num_redundant"]) for row in rows}) == len(rows) > 20
    for row in rows:
        extra = row["slots_per_shard"] - -(-spec.num_experts // row["num_shards"])
        assert row["extra_bytes_per_shard"] == extra * spec.num_moe_layers * spec.expert_bytes
        assert row["kv_tokens_lost"] == row["extra_bytes_per_shard"] // spec.kv_bytes_per_token
        assert 0 < row["evenness"] <= 1 and row["excess"] >= 0


def test_survivability() -> None:
    rows = {(row["name"], row["unit"]): row for row in document()["survivability"]}
    current = small().changes[0].placement
    homes = [[{s for s, held in enumerate(layer) if e in held} for e in range(256)] for layer in current.slots.tolist()]
    single = sum(len(home) == 1 for layer in homes for home in layer) / sum(map(len, homes))
    one_node = sum(len({shard // 2 for shard in home}) == 1 for layer in homes for home in layer) / sum(map(len, homes))
    assert rows["current", "shard"]["single"] == pytest.approx(single, rel=1e-5)
    assert rows["current", "node"]["single"] == pytest.approx(one_node, rel=1e-5)
    assert rows["current", "shard"]["tolerated"] == 0
    spec = small().header.spec
    assert rows["current", "shard"]["redundant_bytes"] == 4 * spec.num_moe_layers * spec.expert_bytes
    twice = rows["every expert twice", "node"]
    assert (twice["tolerated"], twice["single"], twice["num_redundant"]) == (1, 0, 256)
    assert twice["losses"][0]["survived"] == 1


def test_a_phase_without_tokens() -> None:
    windows = tuple(replace(window, prefill=np.zeros_like(window.prefill)) for window in small().windows)
    found = plain(report_numbers(replace(small(), windows=windows), ReportOptions()))
    assert found["phases"][0]["excess"] == 0 and found["phases"][0]["evenness"] == 1
    assert {point["prefill_excess"] for point in found["timeline"]} == {None}


def test_no_tokens_sampled_and_one_shard() -> None:
    trace = make_trace(
        TraceCase("mixtral-8x7b", True, num_shards=1, num_nodes=1, num_windows=2, change_at=None, num_samples=0)
    )
    numbers = report_numbers(trace, ReportOptions(top=3))
    assert numbers.coactivation == () and len(numbers.hottest) == 3 and numbers.survivability == ()
    assert "plot-coactivation" not in render(report_page(numbers), "now")


def test_same_trace_same_report_in_other_processes(tmp_path: Path) -> None:
    """Whatever order sets have there; and the date is all that two reports differ in."""
    path = write_trace(small(), tmp_path / "load.trace")
    code = "import sys; from ep.cli import main; sys.argv[0] = 'ep'; main()"
    pages, documents = [], []
    for seed in ("1", "2"):
        page = tmp_path / f"{seed}.html"
        command = [sys.executable, "-c", code, "report", str(path), "--json", "--html", str(page)]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
        documents.append(done.stdout)
        pages.append(page.read_text(encoding="utf-8"))
    date = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"
    begun = small().header.created
    for found, where in ((pages, rf'<time id="written">{date}</time>'), (documents, rf'"written": "{date}"')):
        assert [len(re.findall(where, text)) for text in found] == [1, 1]
        one, other = (re.sub(where, "", text) for text in found)
        assert one == other and set(re.findall(date, one)) == {begun}


def test_the_date_stands_in_one_place() -> None:
    page = report_page(small_numbers())
    one, other = (render(page, f"[date {number}]") for number in (1, 2))
    assert one.count("[date 1]") == 1 and one.replace("[date 1]", "[date 2]") == other


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ep", "report", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code
    return 0


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_trace(small(), tmp_path / "load.trace")
    monkeypatch.setenv("COLUMNS", "140")
    assert run(monkeypatch, str(path), "--no-html", "--top", "3") == 0
    out = capsys.readouterr().out
    hot = small_numbers().hottest[0]
    assert f"layer {hot.layer}, expert {hot.expert}" in out and "(max-mean)/mean" in out and "bound" in out
    assert [entry.name for entry in tmp_path.iterdir()] == ["load.trace"]
    assert run(monkeypatch, str(path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("format") == 1 and found.pop("written")
    assert found == document() | {"trace": document()["trace"] | {"name": "load.trace"}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["load.trace"]
    assert run(monkeypatch, str(path)) == 0
    assert (tmp_path / "load.html").stat().st_size > 1_000_000
    assert str(tmp_path / "load.html") in capsys.readouterr().err


def test_a_narrow_terminal_breaks_no_figure() -> None:
    """Fewer columns at 80, but what is there is whole."""
    text = {}
    for width in (80, 140):
        console = Console(width=width, file=io.StringIO())
        show(small_numbers(), console)
        text[width] = console.file.getvalue()
        assert "…" not in text[width] and max(map(len, text[width].splitlines())) <= width
    figures = {width: re.findall(r"[\d,.]+ (?:µs|GiB|MiB)|[\d.]+%|[\d.]+×", found) for width, found in text.items()}
    assert (
        figures[80] and set(figures[80]) <= set(figures[140]) and "compute" in text[140] and "compute" not in text[80]
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (units.count(999_999), "999,999"),
        (units.count(1_000_000), "1.00 M"),
        (units.count(123_400_000), "123 M"),
        (units.size(1023), "1023 B"),
        (units.size(3 << 40), "3.0 TiB"),
        (units.seconds(200), "3 min 20 s"),
        (units.seconds(7500), "2 h 5 min"),
        (units.listing((0, 1, 4, 7, 9, 12)), "0, 1, 4, 7 +2"),
        (units.listing(()), "-"),
        (units.percent(None), "-"),
    ],
)
def test_numbers_in_words(words: str, expected: str) -> None:
    assert words == expected


def test_two_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_trace(small(), tmp_path / "one.trace")
    other_trace = make_trace(replace(SMALL, seed=1, num_shards=8))
    other = write_trace(other_trace, tmp_path / "other.trace")
    assert run(monkeypatch, "--compare", str(one), str(other)) == 0
    out = capsys.readouterr().out
    assert "one.trace" in out and "other.trace" in out
    assert (tmp_path / "one-other.html").stat().st_size > 1_000_000
    assert run(monkeypatch, "--compare", str(one), str(other), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["a"]["trace"]["num_shards"] == 4 and found["b"]["trace"]["num_shards"] == 8
    metrics = found["comparison"]["metrics"]
    assert metrics["excess"] == [found[side]["phases"][2]["excess"] for side in "ab"]
    counts = [np.array(found[side]["prefill"]) + found[side]["decode"] for side in "ab"]
    shares = [count / count.sum(axis=1, keepdims=True) for count in counts]
    moved = np.maximum(shares[1] - shares[0], 0).sum(axis=1).mean()
    assert found["comparison"]["moved_share"] == pytest.approx(moved, rel=1e-5)
    planned = report_numbers(read_trace(one), ReportOptions()).plans.planned
    excess, _evenness = measures_by_hand(loads_by_hand(planned, counts[1]))
    assert found["comparison"]["plan_of_a_on_b"] == pytest.approx(excess, rel=1e-5)


def test_a_trace_beside_itself() -> None:
    found = compare(small_numbers(), small_numbers())
    assert found.moved_share == 0 and all(one == other for one, other in found.metrics.values())
    other = report_numbers(make_trace(TraceCase("mixtral-8x7b", True, num_windows=1, change_at=None)), ReportOptions())
    with pytest.raises(TraceError, match="MoE layers of 8 experts, expected those of made-up"):
        compare(small_numbers(), other)


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    header: TraceHeader = small().header
    whole = write_trace(small(), tmp_path / "whole.trace").read_bytes()
    empty_windows = replace(
        small().windows[0], prefill=small().windows[0].prefill * 0, decode=small().windows[0].decode * 0
    )
    silent = write_trace(replace(small(), windows=(empty_windows,), changes=()), tmp_path / "silent.trace").read_bytes()
    cases = {
        b"": "is empty",
        b"\x7fELF and so on": "is no load trace",
        encode_header(header)[:100]: "is cut off within its header",
        encode_header(header): "has no windows",
        encode_header(replace(header, version=9)): "version 9, this ep reads up to version 1",
        whole[:2000] + b"\0" * 40 + whole[2040:]: "is damaged",
        silent: "hold no tokens",
    }
    path = tmp_path / "bad.trace"
    for data, message in cases.items():
        path.write_bytes(data)
        for arguments in ((str(path),), ("--compare", str(path), str(path)), (str(path), "--json")):
            assert run(monkeypatch, *arguments) == 2
            printed = capsys.readouterr()
            assert printed.out == "" and message in printed.err and printed.err.count("\n") == 1
            assert printed.err.startswith(f"ep: {path}: ")
    assert not path.with_suffix(".html").exists()


def test_a_torn_trace_is_reported_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_trace(small(), tmp_path / "load.trace")
    path.write_bytes(path.read_bytes()[:-10])
    assert run(monkeypatch, str(path), "--json") == 0
    found = json.loads(capsys.readouterr().out)["trace"]
    assert found["num_windows"] == SMALL.num_windows - 1
    (warning,) = found["warnings"]
    assert "no whole record" in warning and str(tmp_path) not in warning


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one TRACE"),
        (("x.trace", "--compare", "a.trace", "b.trace"), "give one TRACE"),
        (("missing.trace",), "missing.trace: No such file"),
        (("x.trace", "--html", "x.html", "--no-html"), "exclude each other"),
        (("x.trace", "--top", "0"), "--top"),
    ],
)
def test_bad_options(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1


def test_a_page_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_trace(small(), tmp_path / "load.trace")
    assert run(monkeypatch, str(path), "--json", "--html", str(tmp_path / "missing" / "x.html")) == 2
    assert "x.html: No such file" in capsys.readouterr().err

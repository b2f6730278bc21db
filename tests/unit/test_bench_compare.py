"""`ep bench compare`: what counts as a regression, for every kind of result."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from ep.bench.compare import BETTER, SAME, WORSE, Comparison, compare, read_result
from ep.bench.decode_latency import DecodeLatency
from ep.bench.figures import HIGHER, LOWER, figures
from ep.bench.ipc_result import IpcBench
from ep.bench.joining import JoiningBench
from ep.bench.kernels import KernelBench
from ep.bench.placement import PlacementBench
from ep.bench.rebalance import RebalanceBench
from ep.bench.result import print_json
from ep.bench.serve import ServeBench
from ep.bench.transport import TransportBench
from ep.cli import cli
from ep.errors import OptionError

KERNELS = Path(__file__).parents[2] / "docs" / "benchmarks" / "kernels-h200-2026-11-23.json"
TIMES = st.floats(1e-3, 1e6)
LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms")
SERVED = st.fixed_dictionaries(
    dict.fromkeys(("duration_s", "requests_per_s", "output_tokens_per_s", "total_tokens_per_s"), TIMES)
    | {name: st.fixed_dictionaries(dict.fromkeys(("p50", "p90", "p99"), TIMES)) for name in LATENCIES}
)


@st.composite
def serve_results(draw: st.DrawFn) -> dict[str, Any]:
    """One point in flight, ours and native's, in 1 to 4 rounds."""
    rounds = [
        {"server": server, "round_idx": idx, "served": draw(SERVED)}
        for idx in range(draw(st.integers(1, 4)))
        for server in ("ep", "native")
    ]
    servers = {server: {"served": draw(SERVED)} for server in ("ep", "native")}
    point = {"concurrency": 4, "request_rate": None, "num_prompts": 16}
    measured = {"point": point, "rounds": rounds, "servers": servers, "ratio": {"median": draw(TIMES)}}
    return {"bench": "serve", "points": [measured]}


def verdicts(found: Comparison) -> dict[str, str]:
    return {change.name: change.verdict for change in found.changes}


@given(serve_results(), st.floats(0, 0.99))
def test_a_result_is_no_regression_of_itself(result: dict[str, Any], tolerance: float) -> None:
    found = compare(result, result, tolerance)
    assert len(found.changes) == 2 * 12 + 1 and not found.regressions and not found.differences
    assert all(change.ratio == 1 and change.low <= 1 <= change.high for change in found.changes)


@given(serve_results(), serve_results(), st.floats(0, 0.99))
def test_turned_around_worse_is_better(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    there, back = compare(one, other, tolerance), compare(other, one, tolerance)
    turned = {WORSE: BETTER, BETTER: WORSE, SAME: SAME}
    assert verdicts(back) == {name: turned[verdict] for name, verdict in verdicts(there).items()}
    for forth, again in zip(there.changes, back.changes, strict=True):
        assert math.isclose(forth.ratio * again.ratio, 1)
        assert math.isclose(forth.low * again.high, 1) and math.isclose(forth.high * again.low, 1)


@given(serve_results(), serve_results(), st.floats(0, 0.99), st.floats(0, 0.99))
def test_more_tolerance_finds_fewer(one: dict[str, Any], other: dict[str, Any], first: float, second: float) -> None:
    less, more = sorted((first, second))
    assert set(compare(one, other, more).regressions) <= set(compare(one, other, less).regressions)


@given(serve_results(), st.sampled_from(["output_tokens_per_s", "itl_ms"]), st.sampled_from(["ep", "native"]))
def test_ours_is_judged_by_its_direction_and_native_is_not(result: dict[str, Any], name: str, server: str) -> None:
    changed = copy.deepcopy(result)
    served = changed["points"][0]["servers"][server]["served"]
    if name == "itl_ms":
        served[name]["p99"] *= 1.1
        figure = f"4 in flight, {server}: ITL p99, ms"
    else:
        served[name] /= 1.1
        figure = f"4 in flight, {server}: output tokens/s"
    expected = (figure,) if server == "ep" else ()
    assert compare(result, changed, 0.05).regressions == expected
    assert compare(changed, result, 0.05).regressions == compare(result, changed, 0.2).regressions == ()


def halved(value: Any) -> Any:
    """Every time and rate of a result halved: times become better, rates worse."""
    if isinstance(value, dict):
        return {key: one if key == "point" else halved(one) for key, one in value.items()}
    if isinstance(value, list):
        return [halved(one) for one in value]
    return value / 2 if isinstance(value, float) else value


def filled(kind: Any) -> Any:
    """A value of that type, as benchmarks' results are typed: the same number everywhere."""
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{field.name: filled(hints[field.name]) for field in dataclasses.fields(kind)})
    arguments = [one for one in get_args(kind) if one not in (type(None), Ellipsis)]
    if get_origin(kind) is tuple:
        return tuple(filled(one) for one in arguments)
    if get_origin(kind) is dict:
        return {filled(arguments[0]): filled(arguments[1])}
    if arguments:  # X | None
        return filled(arguments[0])
    return kind(2) if kind in (int, float, str, bool) else None


RESULTS = {
    "serve": ServeBench,
    "decode-latency": DecodeLatency,
    "rebalance": RebalanceBench,
    "placement": PlacementBench,
    "transport": TransportBench,
    "transport-ipc": IpcBench,
    "kernels": KernelBench,
    "joining": JoiningBench,
}


@pytest.mark.parametrize("bench", RESULTS)
def test_every_benchmark_writes_what_compare_reads(bench: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    print_json(bench, filled(RESULTS[bench]), str(path))
    result = read_result(str(path))
    found = compare(result, halved(result), 0.05)
    ours = [change for change in found.changes if change.better in (HIGHER, LOWER)]
    assert ours
    for change in ours:
        by_direction = BETTER if change.better == LOWER else WORSE
        assert change.verdict == (SAME if change.before == change.after else by_direction)
    assert {change.verdict for change in found.changes if change not in ours} <= {SAME}


def test_a_file_that_is_kept() -> None:
    result = read_result(str(KERNELS))
    assert compare(halved(result), result, 0.05).regressions and not compare(result, halved(result), 0.05).regressions


@given(st.recursive(st.none() | st.booleans() | TIMES | st.text(max_size=5), lambda s: st.lists(s, max_size=3)))
def test_what_is_no_result_is_named(junk: Any) -> None:
    for bench in ("nodes", "soak", *RESULTS):
        result = {"bench": bench, "points": junk, "round_trips": junk, "times": junk, "results": junk, "lengths": junk}
        try:
            assert figures(result, "x.json") == [] and bench not in ("rebalance", "soak")
        except OptionError as error:
            assert f"x.json: is no result of this version's ep bench {bench}" in str(error)


def test_conditions_that_differ_are_told() -> None:
    result = json.loads(KERNELS.read_text())
    other = copy.deepcopy(result)
    other["conditions"]["cores"], other["conditions"]["versions"]["torch"] = 3, "9.9"
    other["options"]["slots"] = 7
    other["conditions"]["load_1m"] = 99
    told = ("cores: 16 -> 3", 'torch: "2.11.0" -> "9.9"', "option slots: 32 -> 7")
    assert compare(result, other, 0.05).differences == told


def run_cli(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["bench", "compare", *arguments])


def test_the_exit_code_and_the_json(tmp_path: Path) -> None:
    result = read_result(str(KERNELS))
    worse = copy.deepcopy(result)
    worse["times"][0]["us"] *= 1.06
    name = f"fused_moe, {result['times'][0]['tokens']} tokens, {result['times'][0]['routing']}: ep, µs"
    path = tmp_path / "worse.json"
    path.write_text("a table that was printed before\n" + json.dumps(worse) + "\n")
    done = run_cli(str(KERNELS), str(path))
    assert done.exit_code == 1 and name in " ".join(done.output.split())
    done = run_cli(str(KERNELS), str(path), "--json")
    assert done.exit_code == 1 and json.loads(done.output)["regressions"] == [name]
    for arguments in (("--tolerance", "0.07"), ("--only", "gating")):
        assert run_cli(str(KERNELS), str(path), *arguments).exit_code == 0


def test_mistakes_name_the_file(tmp_path: Path) -> None:
    other, bad = tmp_path / "other.json", tmp_path / "bad.json"
    other.write_text(json.dumps({"bench": "transport", "round_trips": []}))
    bad.write_text("no json\n")
    for arguments, words in (
        ((str(KERNELS), str(other)), ("kernels", "transport", "expected one")),
        ((str(KERNELS), str(bad)), (str(bad), "holds no JSON")),
        ((str(KERNELS), str(tmp_path / "none.json")), ("none.json", "No such file")),
        ((str(KERNELS), str(KERNELS), "--only", "nothing"), ("--only nothing", "no figure in common")),
    ):
        error = run_cli(*arguments).exception
        assert isinstance(error, OptionError) and error.exit_code == 2
        assert all(word in str(error) for word in words), error
    bad.write_text('{"bench": "soup"}')
    with pytest.raises(OptionError, match=r"bad\.json: bench is 'soup', expected one of decode-latency, joining"):
        compare(read_result(str(bad)), read_result(str(bad)), 0.05, (str(bad), str(bad)))

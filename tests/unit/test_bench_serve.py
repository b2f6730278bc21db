"""What `ep bench serve` and `decode-latency` decide before anything starts, and what they make of what they saw."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from ep.bench.client import Load, Percentiles, Served, client_flags
from ep.bench.conditions import conditions
from ep.bench.decode_stream import Batch, summarize
from ep.bench.prompts import PromptFile, check_prompts
from ep.bench.rounds import Measured, Round, sum_up, whole_rounds
from ep.bench.serve import ServeBench, ServeBenchOptions, run
from ep.bench.serve_report import describe
from ep.bench.sweep import Point, sweep
from ep.cli import cli
from ep.errors import OptionError
from ep.sheet import sheet_markdown
from ep.terminal import Terminal

LINE = st.fixed_dictionaries({"prompt": st.text(min_size=1)}, optional={"output_tokens": st.integers(1, 10**6)})


@given(st.lists(LINE, min_size=1, max_size=5), st.none() | st.integers(1, 100))
def test_a_file_of_prompts(lines: list[dict], output_len: int | None) -> None:
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_, **__: text)
        short = [number for number, line in enumerate(lines, 1) if "output_tokens" not in line]
        if short and output_len is None:
            with pytest.raises(OptionError, match=rf"f\.jsonl:{short[0]}: has no output_tokens"):
                check_prompts("f.jsonl", output_len)
        else:
            found = check_prompts("f.jsonl", output_len)
            assert found == PromptFile(str(Path("f.jsonl").resolve()), len(lines), output_len)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "no JSON"),
        ("[]", "is list"),
        ('{"prompt": ""}', "prompt is"),
        ('{"prompt": 3}', "prompt is 3"),
        ("{}", "prompt is null"),
        ('{"prompt": "a", "output_len": 3}', "unknown key output_len"),
        ('{"prompt": "a", "output_tokens": 0}', "output_tokens is 0"),
        ('{"prompt": "a", "output_tokens": true}', "output_tokens is true"),
    ],
)
def test_a_wrong_line_is_named(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine", "output_tokens": 3}\n' + line + "\n")
    with pytest.raises(OptionError) as error:
        check_prompts(str(path), None)
    assert f"{path}:2: " in str(error.value) and words in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    for name, words in (("empty.jsonl", "holds no prompt"), ("none.jsonl", "No such file"), ("a.txt", ".jsonl")):
        with pytest.raises(OptionError, match=words):
            check_prompts(str(tmp_path / name), 8)


def test_the_points_of_a_sweep() -> None:
    assert sweep((), (), None) == (Point(16, None, 64),)
    assert sweep((1, 4), (), 8) == (Point(1, None, 8), Point(4, None, 8))
    assert sweep((), (2.0, math.inf), None) == (Point(None, 2.0, 64), Point(None, None, 64))
    labels = [point.label for point in (*sweep((8,), (0.5, math.inf), 3), *sweep((), (math.inf,), 3))]
    assert labels == ["0.5 requests/s, at most 8 in flight", "8 in flight", "all at once"]
    with pytest.raises(OptionError, match=r"--concurrency 1,2 --request-rate 0\.5"):
        sweep((1, 2), (0.5,), None)


@given(
    st.none() | st.integers(1, 64),
    st.none() | st.floats(0.1, 100),
    st.none() | st.integers(1, 64),
    st.booleans(),
)
def test_the_clients_own_parser_reads_what_was_meant(
    concurrency: int | None, rate: float | None, output_len: int | None, from_file: bool
) -> None:
    prompts = PromptFile("/p.jsonl", 9, output_len) if from_file else None
    load = Load(concurrency, 32, 100, 9, 5, rate, prompts)
    flags = client_flags(load, "http://x", "model", "tokenizer", Path("/logs/out.json"))
    args = client_parser().parse_args(flags)
    assert (args.max_concurrency, args.request_rate) == (concurrency, math.inf if rate is None else rate)
    assert (args.num_prompts, args.seed, args.temperature, args.ignore_eos) == (9, 5, 0, True)
    if from_file:
        wanted = ("custom", "/p.jsonl", output_len or -1, True)
        assert (args.dataset_name, args.dataset_path, args.custom_output_len, args.skip_chat_template) == wanted
    else:
        assert (args.dataset_name, args.random_input_len, args.random_output_len) == ("random", 32, 100)


def client_parser() -> argparse.ArgumentParser:
    global _parser
    if _parser is None:
        serve = pytest.importorskip("vllm.benchmarks.serve")
        _parser = argparse.ArgumentParser()
        serve.add_cli_args(_parser)
    return _parser


_parser: argparse.ArgumentParser | None = None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench", "serve", "--concurrency", "1,x"), "whole numbers of at least 1"),
        (("bench", "serve", "--concurrency", "2,2"), "twice"),
        (("bench", "serve", "--request-rate", "0"), "numbers above 0"),
        (("bench", "serve", "--request-rate", "nan"), "numbers above 0"),
        (("bench", "serve", "one", "two"), "extra argument"),
        (("serve", "--", "--max-model-len", "8"), "Missing argument 'MODEL'"),
        (("bench", "decode-latency", "--input-len", "0"), "whole numbers of at least 1"),
    ],
)
def test_options_that_cannot_be_meant(arguments: tuple[str, ...], words: str) -> None:
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2 and words in done.output


def options_of_runs(monkeypatch: pytest.MonkeyPatch) -> list[ServeBenchOptions]:
    """Filled by `ep bench serve`, which measures nothing then."""
    seen: list[ServeBenchOptions] = []

    def measured(options: ServeBenchOptions, _: Terminal) -> ServeBench:
        seen.append(options)
        return ServeBench(conditions(), options, {}, {}, ())

    monkeypatch.setattr("ep.bench.serve.run", measured)
    monkeypatch.setattr("ep.bench.serve.show", lambda *_: None)
    return seen


def test_flags_for_vllm_do_not_become_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = options_of_runs(monkeypatch)
    for before in ((), ("mixtral-8x7b",)):
        flags = ("--max-model-len", "8", "--", "x")
        done = CliRunner().invoke(cli, ["bench", "serve", *before, "--concurrency", "1,4", "--", *flags])
        assert done.exit_code == 0, done.output
        assert (seen[-1].model, seen[-1].vllm_flags) == ((*before, "deepseek-v3")[0], flags)
        assert (seen[-1].concurrency, seen[-1].request_rate) == ((1, 4), ())


def test_flags_of_either_server(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = options_of_runs(monkeypatch)
    ours, theirs = "--dispatch-dtype fp8 --trace 'a b'", "--enable-expert-parallel --data-parallel-size 2"
    command = ["bench", "serve", "--against", "native", "--shards", "2", "--ep-flags", ours, "--native-flags", theirs]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    assert seen[-1].ep_flags == ("--shards", "2", "--dispatch-dtype", "fp8", "--trace", "a b")
    assert seen[-1].native_flags == tuple(theirs.split())
    done = CliRunner().invoke(cli, ["bench", "serve", "--native-flags", "'unfinished"])
    assert done.exit_code == 2 and "No closing quotation" in done.output


def test_native_flags_need_a_native_server() -> None:
    with pytest.raises(OptionError, match="--native-flags --enforce-eager: goes with --against native"):
        run(ServeBenchOptions(native_flags=("--enforce-eager",)), Terminal(False))


def served(speed: float) -> Served:
    percentiles = Percentiles(speed, 2 * speed, 3 * speed)
    return Served(10.0, speed / 8, speed, 2 * speed, percentiles, percentiles, percentiles)


@given(st.lists(st.tuples(st.floats(1, 1e3), st.floats(1, 1e3)), min_size=1, max_size=5))
def test_rounds_are_summed_up_by_medians_and_the_ratio_by_rounds(speeds: list[tuple[float, float]]) -> None:
    rounds = [
        Round(name, idx, served(speed), {}, 0.0)
        for idx, both in enumerate(speeds)
        for name, speed in zip(("ep", "native") if idx % 2 else ("native", "ep"), both if idx % 2 else both[::-1])
    ]
    measured = sum_up(Point(4, None, 8), rounds)
    assert list(measured.servers) == ["ep", "native"] and measured.ratio is not None
    ratios = sorted(ours / native for ours, native in speeds)
    assert (measured.ratio.low, measured.ratio.high) == (ratios[0], ratios[-1])
    assert ratios[0] <= measured.ratio.median <= ratios[-1]
    ours = sorted(ours for ours, _ in speeds)
    summary = measured.servers["ep"]
    assert (summary.slowest, summary.fastest) == (ours[0], ours[-1])
    assert summary.served.itl_ms.p90 == 2 * summary.served.output_tokens_per_s


@given(st.integers(1, 3), st.integers(0, 3), st.integers(0, 2))
def test_what_an_interruption_leaves_is_of_all_servers(num_servers: int, num_whole: int, num_more: int) -> None:
    names = ("ep", "native", "other")[:num_servers]
    ended = [Round(name, idx, served(1.0), {}, 0.0) for idx in range(num_whole + 1) for name in names]
    ended = ended[: num_whole * num_servers + min(num_more, num_servers - 1)]
    assert whole_rounds(ended, num_servers) == ended[: num_whole * num_servers]


def test_an_incomplete_result_says_so() -> None:
    point = sum_up(Point(4, None, 8), [Round("ep", idx, served(100.0), {}, 0.0) for idx in range(2)])
    found = describe(ServeBench(conditions(), ServeBenchOptions(), {}, {}, (point,), "interrupted"))
    assert found.summary == "**Incomplete**: interrupted." and "INCOMPLETE: interrupted" in found.sheets[0].note
    assert "median of 2 rounds" in found.sheets[0].title


def test_the_report_of_one_point_and_of_several() -> None:
    rounds = [Round("ep", 0, served(100.0), {"ShardActor": 0.5}, 0.0), Round("native", 0, served(80.0), {}, 0.25)]
    points: list[Measured] = [sum_up(Point(n, None, 8), rounds) for n in (1, 4)]
    options = ServeBenchOptions(against="native", rounds=1)
    one = describe(ServeBench(conditions(), options, {}, {}, tuple(points[:1])))
    text = sheet_markdown(one.sheets[0])
    assert "| output tokens/s | 100 | 80 | 1.25 |" in text and "| ITL p99, ms | 300.0 | 240.0 | 1.25 |" in text
    several = describe(ServeBench(conditions(), replace(options, concurrency=(1, 4)), {}, {}, tuple(points)))
    rows = several.sheets[0].rows
    assert [row[:2] for row in rows] == [(f"{n} in flight", name) for n in (1, 4) for name in ("ep", "native")]
    assert rows[0][-1] == "1.25 (1.25 to 1.25)" and {len(row) for row in rows} == {len(several.sheets[0].columns)}
    assert all(series.x == ("1 in flight", "4 in flight") for figure in several.figures for series in figure.series)


@given(
    st.floats(1e-3, 1.0),
    st.lists(st.lists(st.integers(1, 4), min_size=12, max_size=20), min_size=1, max_size=4),
)
def test_an_even_stream_has_its_pace_whatever_its_pieces(step_s: float, pieces: list[list[int]]) -> None:
    """Every token takes step_s; a piece of several tokens comes when its last one is there."""
    seen = []
    for of_request in pieces:
        totals = [sum(of_request[: n + 1]) for n in range(len(of_request))]
        seen.append([(total, total * step_s) for total in totals])
    begun = [stream[0][0] for stream in seen]
    decoded = summarize(seen, begun, 8, 3.0)
    assert decoded.step_ms == pytest.approx(1e3 * step_s) and decoded.mean_ms == pytest.approx(1e3 * step_s)
    assert decoded.first_ms == 3.0


def test_a_longer_batch_starts_with_the_shorter_one() -> None:
    short, long = Batch(3, 8, 4, 1).prompts(), Batch(3, 16, 4, 1).prompts()
    assert [prompt[:8] for prompt in long] == short and len({tuple(prompt) for prompt in short}) == 3
    assert short != Batch(3, 8, 4, 2).prompts() and all(16 <= token < 256 for prompt in long for token in prompt)

"""`ep bench joining`: what it makes of routers' steps; tests/gpu runs it."""

from __future__ import annotations

import json

import pytest

from ep.bench import joining
from ep.bench.conditions import conditions
from ep.bench.joining import JoiningBench, JoiningOptions, describe, sum_up
from ep.bench.joining_router import JoiningRun
from ep.errors import OptionError


def test_all_routers_steps_and_messages_count() -> None:
    found = sum_up(64, True, False, [JoiningRun((4.0, 6.0), 8, 8), JoiningRun((5.0, 5.0, 30.0), 12, 4)])
    assert (found.num_steps, found.step_ms, found.mean_ms, found.joined) == (5, 5.0, 10.0, 0.6)


def test_the_table_has_every_measurement_beside_what_it_is_compared_with() -> None:
    runs = [JoiningRun((5.0,), 4, 2)]
    found = [
        sum_up(tokens, waits, stalls, runs)
        for waits in (True, False)
        for tokens in (16, 64)
        for stalls in (True, False)
    ]
    report = describe(JoiningBench(conditions(), JoiningOptions(num_tokens=(16, 64)), 2, 1, tuple(found)))
    (sheet,) = report.sheets
    assert sheet.title.startswith("2 routers on one GPU")
    assert [row[:3] for row in sheet.rows] == [
        (tokens, stalls, waits)
        for tokens in ("16", "64") for stalls in ("no", "yes") for waits in ("waits", "takes what is there")
    ]  # fmt: skip
    assert {series.x for series in report.figures[0].series} == {(16, 64)}
    assert json.dumps(report.summary)


@pytest.mark.parametrize(
    ("num_gpus", "model", "routers", "words"),
    [
        (0, "deepseek-v3", None, "found no GPU"),
        (1, "deepseek-v3", None, "1 routers, expected at least 2, each on its own GPU, or --routers 2"),
        (4, "deepseek-v3", 1, "1 routers, expected at least 2, each on its own GPU$"),
        (1, "deepseek-v3", 5, "256 experts cannot be split over 5 shards"),
        (3, "deepseek-v3", None, "256 experts cannot be split over 3 shards"),
    ],
)
def test_what_it_cannot_run_on(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, model: str, routers: int | None, words: str
) -> None:
    monkeypatch.setattr(joining, "count_gpus", lambda: num_gpus)
    with pytest.raises(OptionError, match=words):
        joining.run(JoiningOptions(model=model, routers=routers))

"""`ep bench placement` on a small model: its figures agree with each other and its JSON is one line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ep.bench.expert_loads import LOADS, batch, windows
from ep.bench.placement import PlacementBenchOptions, report, run
from ep.errors import OptionError


@pytest.mark.parametrize("name", LOADS)
def test_windows_hold_as_many_tokens_and_depend_on_their_seed(name: str) -> None:
    one, same, other = (windows(name, 3, 64, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.past, same.past) and not np.array_equal(one.past, other.past)
    np.testing.assert_allclose(one.next_shares.sum(axis=1), 1)
    for drawn in (one.past, one.next):
        np.testing.assert_allclose(drawn.sum(axis=1), 64 * 4000, rtol=0.02)
    moved = np.abs(one.next - one.past).sum() / one.past.sum()
    assert (moved > 0.2) == (name in ("bursty", "drifting"))


def test_batches_follow_their_shares() -> None:
    shares = np.array([0.5, 0.25, 0.25, 0.0])
    ids = batch(shares, 4000, 2, np.random.default_rng(0))
    assert ids.shape == (4000, 2) and ids.dtype == np.int32
    np.testing.assert_allclose(np.bincount(ids.ravel(), minlength=4) / ids.size, shares, atol=0.03)


def test_the_figures_agree(capsys: pytest.CaptureFixture[str]) -> None:
    options = PlacementBenchOptions(
        2, 32, ("zipf-1.0", "drifting"), (3, 8, 40), (0, 16), num_tokens=32, top_k=4, repeats=1
    )
    result = run(options)
    sizes = [(row.num_shards, row.num_redundant) for row in result.results[:5]]
    assert sizes == [(3, 0), (8, 0), (3, 16), (8, 16), (40, 16)]
    for row in result.results:
        assert row.bound_excess <= row.excess + 1e-12 and row.split_excess <= row.excess + 1e-6
        assert row.waterfill <= row.round_robin
        if row.vllm_excess is not None:
            assert row.excess <= row.vllm_excess + 5e-4
    report(result)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["bench"] == "placement" and len(last["results"]) == len(result.results)


def test_unknown_load() -> None:
    with pytest.raises(OptionError, match="load is flat, expected one of uniform"):
        run(PlacementBenchOptions(loads=("flat",)))

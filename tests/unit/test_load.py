"""Totals and round-trip histograms, against the plain loops that say the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep.load import (
    NUM_ROUND_TRIP_BUCKETS,
    PHASES,
    ROUND_TRIP_BOUNDS_US,
    round_trip_histogram,
    round_trip_quantile,
    totals,
)
from tests.traces import SMALL, make_trace


def test_totals_by_phase_and_generation() -> None:
    trace = make_trace(SMALL)
    shape = (trace.header.spec.num_moe_layers, trace.header.spec.num_experts)
    by_phase = {phase: totals(trace.windows, shape, phase) for phase in PHASES}
    np.testing.assert_array_equal(by_phase["all"], by_phase["prefill"] + by_phase["decode"])
    tokens = sum(window.num_prefill_tokens for window in trace.windows)
    assert (by_phase["prefill"].sum(axis=1) == tokens * trace.header.spec.top_k).all()
    split = [totals(trace.windows, shape, "decode", generation) for generation in (0, 1)]
    np.testing.assert_array_equal(split[0], sum(window.decode for window in trace.windows[: SMALL.change_at]))
    np.testing.assert_array_equal(split[0] + split[1], by_phase["decode"])
    assert not totals([], shape).any()


@given(st.lists(st.floats(0, 1e9), max_size=40))
def test_every_round_trip_lies_in_its_bucket(times: list[float]) -> None:
    histogram = round_trip_histogram(times)
    assert histogram.shape == (NUM_ROUND_TRIP_BUCKETS,)
    bounds = [*ROUND_TRIP_BOUNDS_US, np.inf]
    expected = [0] * NUM_ROUND_TRIP_BUCKETS
    for time in times:
        expected[next(i for i, bound in enumerate(bounds) if time <= bound)] += 1
    assert histogram.tolist() == expected


@given(st.lists(st.floats(8, 1.6e7), min_size=1, max_size=60), st.floats(0, 1))
def test_a_quantile_is_right_to_a_bucket(times: list[float], quantile: float) -> None:
    exact = float(np.quantile(times, quantile, method="inverted_cdf"))
    found = round_trip_quantile(round_trip_histogram(times), quantile)
    assert found == pytest.approx(exact, rel=2**0.25 - 1)


def test_quantiles_of_nothing_and_beyond_the_bounds() -> None:
    assert round_trip_quantile(round_trip_histogram([]), 0.5) is None
    assert round_trip_quantile(round_trip_histogram([1.0]), 0.5) == ROUND_TRIP_BOUNDS_US[0]
    assert round_trip_quantile(round_trip_histogram([1e12]), 0.5) == ROUND_TRIP_BOUNDS_US[-1]

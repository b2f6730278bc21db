"""The recorder against a plain loop over random steps."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep.link_stats import COUNTERS, LinkStats, link_window
from ep.load import Window, round_trip_histogram, totals
from ep.recorder import MAX_SAMPLES, NUM_RECENT, LoadRecorder
from ep.share import WHOLE, Share
from tests.unit.shards import NUM_EXPERTS, NUM_LAYERS, TOP_K, make_spec

NUM_SHARDS = 3
SHAPE = (NUM_LAYERS, NUM_EXPERTS)
SPEC = make_spec()


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Step:
    """decode: of each token, None where the engine does not say. num_padding: rows behind the tokens."""

    decode: tuple[bool, ...] | None
    num_tokens: int
    num_requests: int
    num_padding: int
    generation: int
    seconds: float
    fails: bool
    seed: int

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """[L, T, K], padding included."""
        rng = np.random.default_rng(self.seed)
        rows = self.num_tokens + self.num_padding
        return rng.random((NUM_LAYERS, rows, NUM_EXPERTS)).argsort(axis=2)[..., :TOP_K].astype(np.int32)

    @property
    def phases(self) -> tuple[bool, ...]:
        """As the recorder's docstring says."""
        if self.decode is not None:
            return self.decode
        return (self.num_tokens == self.num_requests,) * self.num_tokens


@st.composite
def steps(draw: st.DrawFn) -> list[Step]:
    made, generation = [], 0
    for _ in range(draw(st.integers(1, 25))):
        generation += draw(st.sampled_from([0, 0, 0, 0, 1]))
        decode = draw(st.lists(st.booleans(), max_size=12).map(tuple))
        num_tokens = len(decode)
        made.append(
            Step(
                draw(st.sampled_from([decode, None])),
                num_tokens,
                draw(st.integers(min(num_tokens, 1), num_tokens)),
                draw(st.integers(0, 4)),
                generation,
                draw(st.sampled_from([0.1, 0.7, 3.0, 50.0])),
                draw(st.integers(0, 9)) == 0,
                draw(st.integers(0, 2**32 - 1)),
            )
        )
    return made


@dataclass
class Rig:
    """A recorder with the links of a router, on a clock of its own."""

    window_s: float = 2.0
    sample_every: int = 1
    clock: Clock = field(default_factory=Clock)
    closed: list[Window] = field(default_factory=list)
    decode: npt.NDArray[np.bool_] | None = None
    share: Share = WHOLE

    def __post_init__(self) -> None:
        self.links = [LinkStats() for _ in range(NUM_SHARDS)]
        self.recorder = LoadRecorder(
            SPEC,
            NUM_SHARDS,
            window_s=self.window_s,
            sample_every=self.sample_every,
            token_phases=lambda: self.decode,
            on_window=self.closed.append,
            clock=self.clock,
        )

    def run(self, step: Step) -> None:
        self.decode = None if step.decode is None else np.array(step.decode, dtype=bool)
        self.recorder.begin_step(self.links, step.num_tokens, step.num_requests)
        for layer_pos, ids in enumerate(step.ids):
            self.recorder.note(layer_pos, ids, self.share.rows(len(ids)))
            self.carry(step)
        self.clock.now += step.seconds
        if step.fails:
            self.recorder.drop_step()
        else:
            self.recorder.end_step(self.links, step.generation)

    def carry(self, step: Step) -> None:
        """Traffic of one layer, different for every link."""
        for shard_idx, link in enumerate(self.links):
            link.bytes_out += 7 + shard_idx
            link.count(step.num_tokens, step.num_tokens * (shard_idx + 1), 11, step.seed % 1000, 20.0 * (shard_idx + 1))


def all_windows(rig: Rig) -> list[Window]:
    rig.recorder.flush()
    return rig.closed


@given(steps())
def test_counts_equal_a_plain_count(made: list[Step]) -> None:
    rig = Rig()
    for step in made:
        rig.run(step)
    expected = {True: np.zeros(SHAPE, dtype=np.int64), False: np.zeros(SHAPE, dtype=np.int64)}
    tokens: Counter[bool] = Counter()
    recorded = [step for step in made if not step.fails]
    for step in recorded:
        tokens.update(step.phases)
        for layer_pos in range(NUM_LAYERS):
            for row, is_decode in enumerate(step.phases):
                for expert in step.ids[layer_pos, row]:
                    expected[is_decode][layer_pos, expert] += 1
    windows = all_windows(rig)
    np.testing.assert_array_equal(totals(windows, SHAPE, "decode"), expected[True])
    np.testing.assert_array_equal(totals(windows, SHAPE, "prefill"), expected[False])
    assert sum(window.num_decode_tokens for window in windows) == tokens[True]
    assert sum(window.num_prefill_tokens for window in windows) == tokens[False]
    assert sum(window.num_steps for window in windows) == len(recorded)


@given(steps(), st.integers(1, 4))
def test_routers_that_share_the_rows_count_each_of_them_once(made: list[Step], size: int) -> None:
    whole = Rig()
    parts = [Rig(share=Share(rank, size)) for rank in range(size)]
    for step in made:
        for rig in (whole, *parts):
            rig.run(step)
    found = [window for rig in parts for window in all_windows(rig)]
    wanted = all_windows(whole)
    for phase in ("prefill", "decode"):
        np.testing.assert_array_equal(totals(found, SHAPE, phase), totals(wanted, SHAPE, phase))
        tokens = f"num_{phase}_tokens"
        assert sum(getattr(window, tokens) for window in found) == sum(getattr(window, tokens) for window in wanted)


@given(steps())
def test_windows_follow_each_other(made: list[Step]) -> None:
    """Each of one generation, none empty, none longer than the step that ends it makes it, closed before idle time."""
    rig = Rig()
    for step in made:
        rig.run(step)
    windows = all_windows(rig)
    recorded = [step for step in made if not step.fails]
    place = 0
    for window in windows:
        own = recorded[place : place + window.num_steps]
        assert own and window.first_step == place
        assert {step.generation for step in own} == {window.generation}
        assert sum(step.seconds for step in own[:-1]) < rig.window_s
        assert window.seconds >= sum(step.seconds for step in own) - 1e-6
        place += window.num_steps
    assert place == len(recorded)
    for one, after in pairwise(windows):
        assert one.generation != after.generation or one.seconds >= rig.window_s or any(step.fails for step in made)
    if not any(step.fails for step in made):
        for name in COUNTERS:
            for shard_idx, link in enumerate(rig.links):
                assert sum(getattr(window.links[shard_idx], name) for window in windows) == getattr(link, name)
        trips = sum(window.links[1].round_trips for window in windows)
        np.testing.assert_array_equal(trips, rig.links[1].histogram)


@given(steps())
def test_sampled_ids_are_rows_of_their_steps(made: list[Step]) -> None:
    rig = Rig()
    for step in made:
        rig.run(step)
    samples = [sample for window in all_windows(rig) for sample in window.sampled_ids]
    sources = [step for step in made if not step.fails and step.num_tokens]
    assert len(samples) == len(sources)
    for sample, step in zip(samples, sources):
        rows = step.ids[:, : step.num_tokens].transpose(1, 0, 2)
        assert any(np.array_equal(sample, row) for row in rows)


def plain(generation: int = 0, seconds: float = 0.1, num_tokens: int = 4, fails: bool = False) -> Step:
    return Step((True,) * num_tokens, num_tokens, num_tokens, 0, generation, seconds, fails, seed=generation)


def test_samples_are_few() -> None:
    rig = Rig(window_s=1e6, sample_every=3)
    for _ in range(30):
        rig.run(plain())
    rig.recorder.flush()
    for _ in range(3 * MAX_SAMPLES + 30):
        rig.run(plain())
    assert [len(window.sampled_ids) for window in all_windows(rig)] == [10, MAX_SAMPLES]


def test_outside_of_a_step_nothing_is_recorded() -> None:
    rig = Rig()
    rig.recorder.note(0, plain().ids[0])
    rig.carry(plain())
    rig.run(plain())
    rig.recorder.note(0, plain().ids[0])
    rig.recorder.end_step(rig.links, 0)
    (window,) = all_windows(rig)
    assert window.num_steps == 1 and window.counts("all").sum() == 4 * TOP_K * NUM_LAYERS
    assert window.links[0].requests == NUM_LAYERS


def test_a_step_without_tokens_makes_no_window() -> None:
    rig = Rig()
    rig.recorder.begin_step(rig.links, 0, 0)
    rig.recorder.end_step(rig.links, 0)
    rig.recorder.flush()
    assert rig.closed == [] and rig.recorder.recent() == ()


def test_idle_time_closes_a_window_and_is_in_none() -> None:
    rig = Rig(window_s=10.0)
    rig.run(plain(seconds=1.0))
    rig.clock.now += 5.0
    rig.recorder.close_due()
    assert rig.closed == []
    rig.clock.now += 600.0
    rig.recorder.close_due()
    rig.run(plain(seconds=2.0))
    assert [window.seconds for window in all_windows(rig)] == [pytest.approx(1.0), pytest.approx(2.0)]


def test_step_times() -> None:
    rig = Rig(window_s=1e6)
    times = [0.01 * (i + 1) for i in range(100)]
    for seconds in times:
        rig.run(plain(seconds=seconds))
    (window,) = all_windows(rig)
    expected = np.percentile(times, [50, 99])
    assert (window.step_seconds_p50, window.step_seconds_p99) == pytest.approx(tuple(expected))


def test_recent_load() -> None:
    rig = Rig(window_s=10.0)
    assert (rig.recorder.totals_since(60.0).seconds, rig.recorder.totals_since(60.0).counts.sum()) == (0.0, 0)
    for _ in range(5):
        rig.run(plain(seconds=10.0))
    rig.run(plain(seconds=3.0))
    rig.clock.now += 2.0
    ends = {1: 3.0 + 2.0, 2: 5.0 + 10.0, 4: 35.0}
    for num_windows, seconds in ends.items():
        load = rig.recorder.totals_since(seconds - 1.0 if num_windows > 1 else 4.0)
        assert load.seconds == pytest.approx(seconds)
        assert load.counts.shape == SHAPE and load.counts.sum() == num_windows * 4 * TOP_K * NUM_LAYERS
        assert load.pairs.tolist() == [num_windows * NUM_LAYERS * 4 * (1 + shard_idx) for shard_idx in range(3)]
        assert load.compute_ns.shape == (NUM_SHARDS,)
    assert len(rig.closed) == 5, "asking closes nothing"


def test_memory_is_bounded() -> None:
    rig = Rig(window_s=0.05)
    for _ in range(NUM_RECENT + 7):
        rig.run(plain())
    assert rig.recorder.recent() == tuple(rig.closed[-NUM_RECENT:])


def test_flushed_from_another_thread() -> None:
    """Whatever the moment, each step is in exactly one window."""
    rig = Rig(window_s=1e6)
    done = threading.Event()

    def flush() -> None:
        while not done.is_set():
            rig.recorder.flush()
            rig.recorder.totals_since(60.0)

    thread = threading.Thread(target=flush)
    thread.start()
    for _ in range(300):
        rig.run(plain())
    done.set()
    thread.join()
    windows = all_windows(rig)
    assert sum(window.num_steps for window in windows) == 300
    assert totals(windows, SHAPE).sum() == 300 * 4 * TOP_K * NUM_LAYERS
    assert sum(window.links[2].pairs for window in windows) == rig.links[2].pairs


@given(st.lists(st.floats(0, 1e8), max_size=60), st.integers(0, 60))
def test_round_trips_fall_into_buckets(times: list[float], cut: int) -> None:
    link = LinkStats()
    before = link.counters()
    for num, time in enumerate(times):
        if num == cut:
            before = link.counters()
        link.count(1, 2, 3, 4, time)
    later = times[cut:] if cut < len(times) else times
    window = link_window(before, link.counters())
    np.testing.assert_array_equal(window.round_trips, round_trip_histogram(later))
    assert (window.requests, window.pairs, window.compute_ns) == (len(later), 2 * len(later), 4 * len(later))
    assert link.round_trip_us_sum == pytest.approx(sum(times))

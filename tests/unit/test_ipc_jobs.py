"""When a shard's host launches its next job, and how large it is."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ep.ipc_jobs import DECODE_ROWS, RECENT_S, Demand, IpcLimits, bucket
from ep.kernels.p2p_layout import likely_part, likely_rows


@given(num_tokens=st.integers(1, 5000), top_k=st.integers(1, 8), num_shards=st.integers(1, 64))
def test_rows_of_a_message_are_as_many_as_even_choices_make(num_tokens: int, top_k: int, num_shards: int) -> None:
    generator = np.random.default_rng(num_tokens)
    chosen = generator.integers(0, num_shards, (num_tokens, top_k))
    rows = (chosen == 0).any(1).sum()
    likely = likely_rows(num_tokens, likely_part(top_k, num_shards))
    assert 1 <= likely <= num_tokens
    assert rows <= likely + 4 * num_tokens**0.5
    assert num_shards > 1 or likely == num_tokens


@given(num_rows=st.integers(1, 5000))
def test_buckets_are_the_smallest_that_fit(num_rows: int) -> None:
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 1024, 64), *range(1024, 5632, 512)]
    assert bucket(num_rows) == min(size for size in sizes if size >= num_rows)


@given(
    limits=st.builds(IpcLimits, job_tokens=st.integers(8, 64), graph_tokens=st.integers(0, 64),
                     depth=st.integers(1, 4), linger_s=st.sampled_from([0.0, 1.0])),
    messages=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 100), st.booleans()), max_size=8),
    in_flight=st.lists(st.integers(1, 64), max_size=5), pause=st.sampled_from([0.0, 0.5, 2.0]),
)  # fmt: skip
def test_there_is_a_job_whenever_somebody_waits_for_one(
    limits: IpcLimits, messages: list[tuple[int, int, bool]], in_flight: list[int], pause: float
) -> None:
    answered = [0] * 4
    demand = Demand(limits, answered)
    for router in range(4):
        demand.join(router)
    newest: dict[int, tuple[int, int, bool]] = {}
    for seq, (router, rows, is_answered) in enumerate(messages, start=1):
        demand.note(router, seq, rows, now=0.0)
        newest[router] = (seq, rows, is_answered)
    for router, (seq, _, is_answered) in newest.items():
        answered[router] = seq if is_answered else seq - 1
    capacity = demand.next_job(in_flight, now=pause)
    waiting = [rows for _, rows, is_answered in newest.values() if not is_answered]
    is_lingering = bool(messages) and pause < limits.linger_s
    assert 0 <= capacity <= limits.job_tokens
    assert capacity >= min(sum(waiting), limits.job_tokens) or in_flight
    assert not capacity or waiting or is_lingering
    assert capacity or in_flight or not (waiting or is_lingering)
    assert not capacity or len(in_flight) < 2 * limits.depth
    likely = sum(rows for _, rows, is_answered in newest.values() if not is_answered or pause < RECENT_S)
    fitting = [size for size in in_flight if 2 * size >= likely or size == limits.job_tokens]
    assert not capacity or len(fitting) < limits.depth
    for router in list(newest):
        demand.leave(router)
        demand.join(router)  # another one: nothing is known of what it wants
    assert is_lingering or not demand.next_job([], now=pause)


@given(before=st.integers(1, 5000), rows=st.integers(1, 5000), depth=st.integers(1, 8), others=st.integers(0, 8))
def test_jobs_for_a_step_are_of_its_size_whatever_waits_already(
    before: int, rows: int, depth: int, others: int
) -> None:
    limits = IpcLimits(job_tokens=4096, graph_tokens=1024, depth=depth, linger_s=1.0)
    demand = Demand(limits, [1])
    demand.join(0)
    demand.note(0, 1, before, now=0.0)
    in_flight = [min(bucket(before), 4096)] * min(others, depth)
    demand.begin(0, rows, now=0.5)
    fit = [size for size in in_flight if 2 * size >= rows or size == 4096]
    most = depth if bucket(rows) <= DECODE_ROWS else min(depth, 2)
    for _ in range(max(most - len(fit), 0)):
        capacity = demand.next_job(in_flight, now=0.51)
        assert capacity == min(bucket(rows), 4096)
        in_flight.append(capacity)
    assert not demand.next_job(in_flight, now=0.51)
    assert not demand.next_job([], now=2.0)  # no message came of it

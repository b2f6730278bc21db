"""The kernels of the ipc data plane against their torch twins, bit for bit, in Triton's interpreter."""

from __future__ import annotations

import threading
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep.kernels import p2p, p2p_layout, p2p_reference
from ep.kernels.p2p_layout import Header, MessageShape, pack_header
from tests.unit.kernel_cases import on_cpu
from tests.unit.p2p_cases import World, copy, make_world, next_seq, run_router, run_shards
from tests.unit.p2p_queue import SMALL, Queue

BOTH = (p2p, p2p_reference)
INT32_MAX = 2**31 - 1


def assert_same(ours: World, twins: World, num_rows: int) -> None:
    """Everything that a kernel writes; what lies beyond a message's rows was zero and must be."""
    for name in ("slots", "sent"):
        assert torch.equal(getattr(ours.plan, name), getattr(twins.plan, name)), name
    assert torch.equal(ours.plan.owners[:num_rows], twins.plan.owners[:num_rows])
    for name in ("load", "inbox", "mailboxes", "box", "shard_hosts"):
        assert torch.equal(getattr(ours, name), getattr(twins, name)), name
    for our_desk, their_desk in zip(ours.desks, twins.desks, strict=True):
        for name in ("taken", "words"):
            assert torch.equal(getattr(our_desk, name), getattr(their_desk, name)), name
    assert ours.words[p2p_layout.SEQ] == twins.words[p2p_layout.SEQ]


routers = {
    "num_shards": st.integers(1, 5),
    "top_k": st.integers(1, 5),
    "num_rows": st.integers(1, 7),
    "seed": st.integers(0, 2**31),
}


@on_cpu
@settings(max_examples=15)
@given(
    **routers,
    num_tokens=st.integers(0, 9),
    num_decode=st.integers(0, 9),
    first=st.integers(0, 4),
    dtype=st.sampled_from([torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.bfloat16]),
    far=st.sets(st.integers(0, 4), max_size=2),
    first_seq=st.sampled_from([0, 5, INT32_MAX, -1]),
)
def test_messages_are_the_twins(
    num_shards: int, top_k: int, num_rows: int, seed: int, num_tokens: int, num_decode: int, first: int,
    dtype: torch.dtype, far: set[int], first_seq: int,
) -> None:  # fmt: skip
    world = make_world(
        num_shards, top_k=top_k, dtype=dtype, seed=seed,
        first_seq=first_seq, far_shards=tuple(far),
    )  # fmt: skip
    world.words[p2p_layout.NUM_TOKENS], world.words[p2p_layout.NUM_DECODE] = num_tokens, num_decode
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, world.message.hidden, generator=generator).bfloat16()
    ids = torch.randint(0, 8, (num_rows, top_k), generator=generator, dtype=torch.int32)
    weights = torch.rand(num_rows, top_k, generator=generator)
    worlds = (world, copy(world))
    for ops, each in zip(BOTH, worlds, strict=True):
        run_router(ops, each, x, ids, weights, first)
    assert_same(*worlds, num_rows)
    assert not any((world.plan.owners[:num_rows] >> shard & 1).any() for shard in far if shard < num_shards)


@on_cpu
@settings(max_examples=8)
@given(
    **routers,
    parts=st.integers(1, 3),
    dtype=st.sampled_from([torch.float8_e4m3fn, torch.bfloat16]),
    partial_dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    at_once=st.booleans(),
    first_seq=st.sampled_from([0, INT32_MAX]),
)
def test_round_trips_are_the_twins(
    num_shards: int, top_k: int, num_rows: int, seed: int, parts: int, dtype: torch.dtype, partial_dtype: torch.dtype,
    at_once: bool, first_seq: int,
) -> None:  # fmt: skip
    world = make_world(
        num_shards, top_k=top_k, dtype=dtype, partial_dtype=partial_dtype, seed=seed, first_seq=first_seq,
    )  # fmt: skip
    worlds, outs = (world, copy(world)), []
    generator = torch.Generator().manual_seed(seed)
    for num in (num_rows, max(num_rows // 2, 1)):  # the second call finds the first one's leavings
        x = torch.randn(num, world.message.hidden, generator=generator).bfloat16()
        ids = torch.randint(0, 8, (num, top_k), generator=generator, dtype=torch.int32)
        weights = torch.rand(num, top_k, generator=generator)
        outs = []
        for ops, each in zip(BOTH, worlds, strict=True):
            run_router(ops, each, x, ids, weights)
            run_shards(ops, each, next_seq(each), parts)
            out = torch.full_like(x, float("nan"))
            waiting = each.flags, each.words, each.host.data_ptr()
            if at_once:
                ops.wait_and_combine(each.partials, each.plan, out, *waiting)
            else:
                ops.wait_partials(each.plan, *waiting, num)
                ops.combine_partials(each.partials, each.plan, out)
            assert not each.words[p2p_layout.FAILED]
            outs.append(out)
        assert_same(*worlds, num)
        assert torch.equal(*outs)
        expected = x.float() * weights.sum(1, keepdim=True)  # every token went to all of its experts, exactly once
        torch.testing.assert_close(outs[0].float(), expected, rtol=0.1, atol=0.2)


def dispatch(ops: ModuleType, world: World, ids: torch.Tensor) -> None:
    x, weights = torch.zeros(len(ids), world.message.hidden, dtype=torch.bfloat16), torch.zeros(ids.shape)
    run_router(ops, world, x, ids, weights)


@settings(max_examples=25, deadline=None)
@given(num_rows=st.integers(1, 600), seed=st.integers(0, 2**31), hot=st.booleans())
def test_pairs_of_an_expert_are_dealt_out_evenly(num_rows: int, seed: int, hot: bool) -> None:
    world = make_world(4, max_tokens=600, top_k=2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 2 if hot else 8, (num_rows, 2), generator=generator, dtype=torch.int32)
    dispatch(p2p_reference, world, ids)
    windows = -(-num_rows // p2p.WINDOW)
    for expert in range(8):
        slots = world.plan.slots[:num_rows][ids == expert]
        num_replicas = int(world.tables.num_replicas[1, expert])
        counts = [int((slots == slot).sum()) for slot in world.tables.replicas[1, expert, :num_replicas]]
        assert sum(counts) == len(slots) == world.load[0, 1, expert]
        assert max(counts) - min(counts) <= windows


@on_cpu
def test_pairs_are_dealt_out_as_the_twins_do_beyond_a_window() -> None:
    worlds = [make_world(4, max_tokens=600, top_k=2) for _ in BOTH]
    ids = torch.randint(0, 3, (p2p.WINDOW + 20, 2), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    for ops, world in zip(BOTH, worlds, strict=True):
        dispatch(ops, world, ids)
    assert_same(*worlds, len(ids))


@on_cpu
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("ops", BOTH)
def test_an_aborted_wait_fails_and_stops_what_follows(ops: ModuleType, at_once: bool) -> None:
    world = make_world(3)

    def wait() -> None:
        waiting = world.flags, world.words, world.host.data_ptr()
        if at_once:
            ops.wait_and_combine(world.partials, world.plan, torch.zeros_like(x), *waiting)
        else:
            ops.wait_partials(world.plan, *waiting, 4)

    x = torch.randn(4, world.message.hidden).bfloat16()
    ids, weights = torch.arange(12).remainder(8).int().view(4, 3), torch.rand(4, 3)
    world.words[p2p_layout.STEP] = 7
    run_router(ops, world, x, ids, weights)
    awaited = torch.tensor([bool((world.plan.owners[:4] >> shard & 1).any()) for shard in range(3)])
    answered = int(awaited.nonzero()[0])
    world.flags[answered] = 1
    world.host[p2p_layout.ABORT] = 1
    wait()
    assert world.words[p2p_layout.FAILED] == 1
    assert world.host[p2p_layout.FAILED_STEP] == 7
    late = world.host[p2p_layout.LATE : p2p_layout.LATE + 3].bool()
    assert torch.equal(late, awaited & (torch.arange(3) != answered))
    before = world.inbox.clone(), world.mailboxes.clone()
    world.words[p2p_layout.STEP] = 8
    run_router(ops, world, x + 1, ids, weights)
    wait()
    assert torch.equal(world.inbox, before[0]) and torch.equal(world.mailboxes, before[1])
    assert world.host[p2p_layout.FAILED_STEP] == 7


@given(
    seq=st.integers(-(2**31), INT32_MAX), layer=st.integers(0, 2047), tokens=st.integers(0, 2**13 - 1),
    generation=st.integers(0, 10**6),
)  # fmt: skip
def test_headers_survive_packing(seq: int, layer: int, tokens: int, generation: int) -> None:
    word = pack_header(seq, layer, tokens, generation)
    assert -(2**63) <= word < 2**63
    assert Header.unpack(word) == Header(seq, layer, tokens, generation % 256)


@on_cpu
@settings(max_examples=20, deadline=None)
@given(
    num_routers=st.integers(1, 11),
    messages=st.lists(st.tuples(st.integers(0, 10), st.integers(0, 13), st.integers(0, 3), st.sampled_from([7, 9, 8]),
                                st.integers(0, 2**13 - 1) | st.just(0)), max_size=12),
    capacity=st.integers(1, 12), larger=st.integers(0, 4), likely=st.integers(0, 320), patience=st.integers(0, 3),
    window=st.integers(0, 4), whole_rows=st.integers(1, 16), debt=st.integers(0, 99), first=st.integers(0, 10),
    stop=st.booleans(),
    expected=st.lists(st.integers(-1, 2), min_size=11, max_size=11), cut_off=st.sets(st.integers(0, 10), max_size=2),
)  # fmt: skip
def test_jobs_take_what_waits_as_the_twins_do(
    num_routers: int, messages: list[tuple[int, int, int, int, int]], capacity: int, larger: int, likely: int,
    patience: int, window: int, whole_rows: int, debt: int, first: int, stop: bool, expected: list[int],
    cut_off: set[int],
) -> None:  # fmt: skip
    """Layer 3 is one too many, 13 tokens are, 8 is no generation that is served; jobs until there is nothing left,
    larger ones after those that leave messages to them. Routers that are cut off have not written all of their message,
    and do not go on."""
    queues = [Queue.make(num_routers) for _ in range(2)]
    wanted: dict[int, list[int]] = {}
    for seq, (router, tokens, layer, generation, rows) in enumerate(messages, start=1):
        at = router % num_routers
        for queue in queues:
            queue.write(at, seq, tokens, layer, generation, rows)
        is_good = 0 < tokens <= SMALL.max_tokens and layer < 3 and generation != 8
        wanted[at] = [token for token in range(tokens) if rows >> token & 1] if is_good else []
        if is_good and at in cut_off:
            wanted[at] = []
            for queue in queues:
                queue.inboxes[at, SMALL.flags_offset :].view(torch.int32)[tokens - 1] = 0
    for queue in queues:
        queue.desk.words[p2p_layout.NEXT] = first % num_routers
        queue.desk.words[p2p_layout.DEBT] = debt
        queue.host[p2p_layout.STOP] = stop
        queue.desk.taken[:, 3] = torch.tensor(expected[:num_routers])
    ours, twins = queues
    with patch.object(p2p, "FLAG_LOOKS", 3), patch.object(p2p_reference, "FLAG_LOOKS", 3):
        size, in_vain = capacity, 0
        while in_vain <= num_routers:  # in turn, whoever is cut off
            for ops, queue in zip(BOTH, queues, strict=True):
                sizes = size, capacity + larger, likely
                while ops.take(queue.desk, SMALL, 3, queue.job, *sizes, patience, window, whole_rows) is False:
                    pass
            for name in ("taken", "words"):
                assert torch.equal(getattr(ours.desk, name), getattr(twins.desk, name)), name
            for name in ("layer_idx", "num_tokens"):
                assert torch.equal(getattr(ours.job, name), getattr(twins.job, name)), name
            total = int(ours.job.num_tokens)
            assert total <= size
            size = capacity if total else capacity + larger
            in_vain = in_vain + 1 if ours.desk.words[p2p_layout.IDLE] else 0
            for name in ("source", "numbers"):
                assert torch.equal(getattr(ours.job, name)[:total], getattr(twins.job, name)[:total]), name
            ended, numbers = (
                [queue.job.job[place : place + num_routers] for queue in queues]
                for place in (p2p_layout.ENDED, p2p_layout.NUMBERS)
            )
            assert torch.equal(*ended) and torch.equal(*(each * ended[0] for each in numbers))
            for source in ours.job.source[:total].tolist():
                router, row = source >> p2p_layout.ROW_BITS, source & (1 << p2p_layout.ROW_BITS) - 1
                assert wanted[router].pop(0) == row
            assert all(not wanted.get(router) for router in ended[0].nonzero().flatten().tolist())
    assert not any(wanted.values())


@given(numbers=st.lists(st.integers(0, 2**31 - 1), min_size=3, max_size=3), steps=st.integers(1, 2**31 - 1),
       rows=st.integers(0, 4096))  # fmt: skip
def test_a_step_begins_as_the_twins_begin_it(numbers: list[int], steps: int, rows: int) -> None:
    begun = p2p_layout.pack_begun(steps, rows) if rows else 0
    found = []
    for ops in BOTH:
        words = torch.full((p2p_layout.NUM_WORDS,), 7, dtype=torch.int32)
        host = torch.full((p2p_layout.router_words(2),), 7, dtype=torch.int32)
        ops.begin_step(words, host.data_ptr(), *numbers, begun)
        found.append((words, host))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    (words, host), _ = found
    assert [int(words[place]) for place in (p2p_layout.NUM_TOKENS, p2p_layout.NUM_DECODE, p2p_layout.STEP)] == numbers
    assert p2p_layout.begun_rows(int(host[p2p_layout.BEGUN])) == (rows or 7)
    assert not rows or begun != p2p_layout.pack_begun(steps + 1, rows)


@on_cpu
def test_who_goes_on_meanwhile_is_found_by_the_next_job() -> None:
    """Nothing of its message was for this shard, which was busy until the router had its answers from others. (The twin
    looks for messages anew whenever it is called.)"""
    queue = Queue.make(1)

    def take() -> int:
        p2p.take(queue.desk, SMALL, 3, queue.job, 16, 16, 0, 1, 0, 1)
        return int(queue.job.num_tokens)

    assert take() == 0 and queue.desk.words[p2p_layout.IDLE]
    queue.write(0, 1, 3, 0, 7, 0)
    queue.inboxes[0, SMALL.flags_offset :].view(torch.int32)[2] = 0
    going_on = threading.Timer(0.3, queue.write, (0, 2, 4, 1, 7, 0b1010))
    going_on.start()
    assert take() == 0 and not queue.desk.words[p2p_layout.IDLE]
    going_on.join()
    assert take() == 2 and int(queue.job.layer_idx) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden": 200}, "hidden size is 200"),
        ({"max_tokens": 0}, "0 tokens in a message"),
        ({"top_k": 65}, "65 choices"),
        ({"dtype": torch.float16}, "rows are torch.float16"),
        ({"partial_dtype": torch.float16}, "partials are torch.float16"),
    ],
)
def test_what_is_not_supported(change: dict[str, object], reason: str) -> None:
    good = {"max_tokens": 8, "hidden": 256, "top_k": 2, "dtype": torch.bfloat16}
    assert p2p.supports(MessageShape(**good), 2, 58) == (True, "ok")
    assert reason in p2p.supports(MessageShape(**{**good, **change}), 2, 58)[1]
    assert "0 shards" in p2p.supports(MessageShape(**good), 0, 58)[1]
    assert "3000 MoE layers" in p2p.supports(MessageShape(**good), 2, 3000)[1]

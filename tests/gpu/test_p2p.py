"""The kernels of the ipc data plane on a GPU: bits against the torch twins, and round trips from within a graph.

`small` marks what is small enough for compute-sanitizer: compute-sanitizer --error-exitcode 9 python -m pytest
tests/gpu -k small
"""

from __future__ import annotations

import time

import pytest
import torch

from ep.kernels import p2p, p2p_layout, p2p_reference
from ep.kernels.devices import current_device
from ep.kernels.p2p_layout import Header
from tests.unit.p2p_cases import World, copy, make_world, next_seq, run_router, run_shards


def assert_same(ours: World, twins: World, num_rows: int) -> None:
    for name in ("slots", "sent"):
        assert torch.equal(getattr(ours.plan, name).cpu(), getattr(twins.plan, name)), name
    assert torch.equal(ours.plan.owners[:num_rows].cpu(), twins.plan.owners[:num_rows])
    for name in ("load", "inbox", "mailboxes", "box", "shard_hosts"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(twins, name)), name
    for our_desk, their_desk in zip(ours.desks, twins.desks, strict=True):
        for name in ("taken", "words"):
            assert torch.equal(getattr(our_desk, name).cpu(), getattr(their_desk, name)), name


@pytest.mark.parametrize("partial_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("num_shards", "num_rows", "top_k"), [(1, 1, 1), (2, 8, 8), (3, 100, 3), (8, 300, 8)])
def test_small_round_trips_are_the_twins(
    num_shards: int, num_rows: int, top_k: int, quantized: bool, at_once: bool, partial_dtype: torch.dtype
) -> None:
    dtype = current_device().fp8_dtype if quantized else torch.bfloat16
    if dtype is None:
        pytest.skip("no FP8 matrix units")
    world = make_world(
        num_shards, max_tokens=300, top_k=top_k, dtype=dtype, partial_dtype=partial_dtype,
        first_seq=2**31 - 2,
    )  # fmt: skip
    ours = copy(world, "cuda")
    for num in (num_rows, max(num_rows // 2, 1)):
        x = torch.randn(num, world.message.hidden).bfloat16()
        ids = torch.randint(0, 8, (num, top_k), dtype=torch.int32)
        weights = torch.rand(num, top_k)
        outs = []
        for ops, each in ((p2p, ours), (p2p_reference, world)):
            device = each.words.device
            run_router(ops, each, x.to(device), ids.to(device), weights.to(device))
            torch.cuda.synchronize()
            run_shards(ops, each, next_seq(each))
            waiting = each.flags, each.words, each.host.data_ptr()
            outs.append(torch.full(x.shape, float("nan"), device=device).bfloat16())
            if at_once:
                ops.wait_and_combine(each.partials, each.plan, outs[-1], *waiting)
            else:
                ops.wait_partials(each.plan, *waiting, num)
                ops.combine_partials(each.partials, each.plan, outs[-1])
        torch.cuda.synchronize()
        assert_same(ours, world, num)
        assert torch.equal(outs[0].cpu(), outs[1])


def answer(world: World, seq: int, deadline: float) -> None:
    """Serves the message of this number once its headers are there."""
    while {Header.unpack(int(box)).seq for box in world.mailboxes} != {seq}:
        assert time.monotonic() < deadline, f"message {seq} did not come: {world.mailboxes}"
    run_shards(p2p, world, seq, patience=1 << 13)  # their device may learn of it after this host


def test_small_graph_of_round_trips_beside_the_shards() -> None:
    """The router's graph waits on the device while this thread serves its shards from another stream."""
    layers, rows = 3, 33
    world = copy(make_world(2, max_tokens=64, top_k=4, dtype=torch.bfloat16), "cuda")
    x = torch.randn(rows, world.message.hidden, device="cuda").bfloat16()
    ids = torch.randint(0, 8, (rows, 4), dtype=torch.int32, device="cuda")
    weights = torch.rand(rows, 4, device="cuda")
    outs = torch.zeros(layers, *x.shape, dtype=x.dtype, device="cuda")
    inboxes, mailboxes = world.addresses(world.inbox), world.addresses(world.mailboxes)

    def layer(out: torch.Tensor) -> None:
        p2p.dispatch_tokens(
            x, ids, weights, world.tables, world.plan, world.message, world.load, inboxes, mailboxes, world.words, 1
        )
        p2p.wait_partials(world.plan, world.flags, world.words, world.host.data_ptr(), rows)
        p2p.combine_partials(world.partials, world.plan, out)

    # Nothing may be compiled, loaded or allocated while a kernel waits for this thread.
    run_router(p2p, world, x, ids, weights)
    torch.cuda.synchronize()
    answer(world, 1, time.monotonic() + 60)
    p2p.wait_partials(world.plan, world.flags, world.words, world.host.data_ptr(), rows)
    p2p.combine_partials(world.partials, world.plan, outs[0])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for out in outs:
                layer(out)
        for replay in range(3):
            outs.zero_()
            graph.replay()
            with torch.cuda.stream(torch.cuda.default_stream()):
                for seq in range(2 + replay * layers, 2 + (replay + 1) * layers):
                    answer(world, seq, time.monotonic() + 10)
            stream.synchronize()
            expected = x.float() * weights.sum(1, keepdim=True)
            for out in outs:
                torch.testing.assert_close(out.float(), expected, rtol=0.03, atol=0.05)
            assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_small_abort_ends_a_graph_and_the_gpu_lives_on() -> None:
    world = copy(make_world(2, max_tokens=64, top_k=4, dtype=torch.bfloat16), "cuda")
    x = torch.randn(8, world.message.hidden, device="cuda").bfloat16()
    ids = torch.randint(0, 8, (8, 4), dtype=torch.int32, device="cuda")
    weights = torch.rand(8, 4, device="cuda")
    addresses = world.addresses(world.inbox), world.addresses(world.mailboxes)
    stream = torch.cuda.Stream()
    world.words[p2p_layout.STEP] = 7
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(5):  # all of them wait for shards that never answer
            run_router(p2p, world, x, ids, weights, addresses=addresses)
            p2p.wait_partials(world.plan, world.flags, world.words, world.host.data_ptr(), 8)
    time.sleep(0.5)
    assert not stream.query()
    assert world.host[p2p_layout.WAITING_SEQ] == 1
    start = time.monotonic()
    world.host[p2p_layout.ABORT] = 1
    stream.synchronize()
    assert time.monotonic() - start < 1.0
    assert world.host[p2p_layout.FAILED_STEP] == 7 and world.words[p2p_layout.FAILED] == 1
    assert {Header.unpack(int(box)).seq for box in world.mailboxes} == {1}  # nothing was sent after it
    assert float((x.float() @ x.float().T).isfinite().all())

"""How a wait on a simulated GPU ends where it is not answered, and what comes after."""

from __future__ import annotations

import time

import pytest
import torch

from ep.errors import DeadlineError, ShardFailedError, ShardLostError
from ep.kernels import p2p_layout as layout
from ep.kernels.p2p import Job
from ep.placement import Placement
from ep.transport.ipc_watch import STUCK_S, WATCH_S
from ep.transport.mailbox import MailboxBlock
from tests.unit.ipc_rig import EXPERTS, LAYERS, PLACEMENT, Rig, Tokens, assert_close


def test_a_refused_generation_is_an_error_of_the_step_and_the_next_one_works(rig: Rig) -> None:
    router, tokens = rig.routers[0], Tokens.random(6)
    router.set_placement(Placement(7, EXPERTS, PLACEMENT.slots))
    tokens.send(router, 0)
    tokens.send(router, 1)
    rig.serve()
    rig.devices[0].synchronize()
    with pytest.raises(ShardFailedError, match="shard 0: it does not serve placement generation 7"):
        router.check()
    rig.served.add(7)
    router.reset()
    got = tokens.send(router, 1)
    rig.serve()
    router.check()
    assert_close(got, tokens.expected(1))
    assert [server.stats.refused for server in rig.servers] == [1, 1]


def test_a_refusal_that_comes_late_ends_no_later_step(rig: Rig) -> None:
    router, tokens = rig.routers[0], Tokens.random(6)
    router.set_placement(Placement(7, EXPERTS, PLACEMENT.slots))
    tokens.send(router, 0)
    rig.devices[0].run()
    late = layout.Header.unpack(int(rig.block.headers[0, 1]))
    rig.servers[0].poll()
    rig.devices[0].synchronize()
    with pytest.raises(ShardFailedError, match="shard 0"):
        router.check()
    router.reset()
    router.set_placement(PLACEMENT)
    got = tokens.send(router, 1)
    rig.devices[0].run()
    rig.servers[1]._look_at(rig.servers[1]._peers[0], late, 0.0)
    assert rig.servers[1].stats.refused == 1
    time.sleep(4 * WATCH_S)
    rig.serve()
    router.check()
    assert_close(got, tokens.expected(1))


def test_a_message_of_no_such_layer_is_refused(rig: Rig) -> None:
    Tokens.random(4).send(rig.routers[1], 0)
    rig.devices[1].run()
    sent = layout.Header.unpack(int(rig.block.headers[1, 0]))
    rig.block.headers[1, 0] = layout.pack_header(sent.seq, LAYERS, 2)
    rig.servers[0].poll()
    rig.devices[1].synchronize()
    with pytest.raises(ShardFailedError, match=f"MoE layer {LAYERS} or longer"):
        rig.routers[1].check()


def test_a_lost_shard_ends_the_wait_and_its_successor_serves(block: MailboxBlock) -> None:
    rig = Rig(block)
    router, tokens = rig.routers[0], Tokens.random(9)
    outs = [tokens.send(router, layer) for layer in range(LAYERS)]
    rig.devices[0].run()
    rig.servers[0].poll()
    rig.shard_devices[0].run()
    rig.devices[0].run()
    assert not rig.devices[0].is_idle  # shard 1 is silent
    router.abort(1, "its process 1 ended")
    rig.devices[0].run()
    assert rig.devices[0].is_idle
    for _ in range(2):
        with pytest.raises(ShardLostError, match="shard 1: its process 1 ended"):
            router.check()
    successor = rig.servers[1] = rig.make_server(1)
    router.replace(1, successor.attach(router.handles))
    router.reset()
    outs = [tokens.send(router, layer) for layer in range(LAYERS)]
    rig.serve()
    router.check()
    for layer, got in enumerate(outs):
        assert_close(got, tokens.expected(layer))
    assert successor.stats.messages == LAYERS  # what the lost one left unanswered is not served again
    rig.close()


def test_a_shard_that_is_slower_than_the_end_of_another_one_is_not_lost(rig: Rig) -> None:
    router, tokens = rig.routers[0], Tokens.random(9)
    tokens.send(router, 0)
    rig.devices[0].run()
    router.abort(1, "its process 1 ended")  # neither has answered
    rig.devices[0].run()
    assert rig.devices[0].is_idle and list(router.lost_shards()) == [1]


def test_the_watchdog_ends_waits_for_silent_and_for_lost_shards(block: MailboxBlock) -> None:
    rig = Rig(block, deadline_s=0.3)
    router, tokens = rig.routers[0], Tokens.random(4, experts=EXPERTS // 2)
    reasons: dict[int, str] = {}
    router._watch.is_lost = reasons.get
    for error, text in ((DeadlineError, "shard 0: no answer within 0.3 s"), (ShardLostError, "shard 0: gone")):
        start = time.monotonic()
        tokens.send(router, 0)
        rig.devices[0].synchronize()
        assert time.monotonic() - start < 1.0
        with pytest.raises(error, match=text):
            router.check()
        router.reset()
        reasons[0] = "gone"
    rig.close()


def test_a_launch_beside_the_router_that_waits_for_its_step_ends_it(block: MailboxBlock) -> None:
    rig = Rig(block)
    router, server, tokens = rig.routers[0], rig.servers[0], Tokens.random(12)
    seen: list[float] = []
    compute = server._launcher._compute

    def slow(job: Job, capacity: int, out: torch.Tensor) -> None:
        rig.now += 5.0
        seen.append(server.launching_s)
        compute(job, capacity, out)

    server._launcher._compute = slow
    tokens.send(router, 0)
    rig.serve()
    router.check()
    assert seen == [5.0] and server.launching_s == 0.0  # 12 rows are more than a graph is captured for
    start = time.monotonic()
    router.host(1, lambda: time.monotonic() - start + 2.0)
    tokens.send(router, 0)
    rig.devices[0].synchronize()
    assert time.monotonic() - start < 1.0
    with pytest.raises(DeadlineError, match=f"shard 1: no answer within {STUCK_S} s"):
        router.check()
    assert router.lost_shards() == {}  # nobody is to be replaced, and the step may be tried again
    router.reset()
    got = tokens.send(router, 1)
    time.sleep(4 * WATCH_S)  # it was not for the step that this launch waits: the next one goes on beside it
    rig.serve()
    router.check()
    assert_close(got, tokens.expected(1))
    rig.close()


def test_a_serving_thread_that_fails_tells_its_routers(block: MailboxBlock) -> None:
    rig = Rig(block)
    router, server = rig.routers[0], rig.servers[0]

    def broken() -> set[int]:
        raise RuntimeError("no memory")

    server._generations = broken
    server.start()
    Tokens.random(4).send(router, 0)
    rig.devices[0].synchronize()
    with pytest.raises(ShardLostError, match="its serving thread failed"):
        router.check()
    assert list(router.lost_shards()) == [0]
    server.stop()
    assert isinstance(server.error, RuntimeError)
    rig.close()


def test_a_generation_that_is_dropped_is_not_answered_from_then_on(rig: Rig) -> None:
    router, tokens = rig.routers[0], Tokens.random(6)
    tokens.send(router, 0)
    rig.serve()
    rig.served.clear()
    rig.served.add(1)
    for server in rig.servers:
        server.refresh()
    tokens.send(router, 1)
    for device in (*rig.devices, *rig.shard_devices, *rig.devices):
        device.run()
    assert not rig.devices[0].is_idle
    rig.serve()
    rig.devices[0].synchronize()
    with pytest.raises(ShardFailedError, match="does not serve placement generation 0"):
        router.check()

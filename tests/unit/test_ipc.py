"""The host side of the ipc data plane on a simulated GPU: who serves what, and when."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from ep import ipc_server
from ep.errors import OptionError, PlacementError, TransportError
from ep.kernels import p2p_layout as layout
from ep.kernels.p2p import CREDIT, Job
from ep.placement import even_split
from ep.transport.ipc import IpcTransport
from ep.transport.mailbox import MailboxBlock
from tests.unit.ipc_rig import AHEAD, EXPERTS, LAYERS, LIMITS, PLACEMENT, Rig, Tokens, assert_close
from tests.unit.simulated import SimulatedDevice, SimulatedExperts, message_shape


def test_layers_of_two_routers_from_graphs(rig: Rig) -> None:
    tokens = [Tokens.random(5, 1), Tokens.random(11, 2)]
    outs: list[list[torch.Tensor]] = [[], []]
    graphs = []
    for router, device, some, out in zip(rig.routers, rig.devices, tokens, outs, strict=True):
        graphs.append(device.capture(lambda: out.extend(some.send(router, layer) for layer in range(LAYERS))))  # noqa: B023
    for _ in range(3):
        for graph in graphs:
            graph()
        rig.serve()
        for router, device, some, out in zip(rig.routers, rig.devices, tokens, outs, strict=True):
            assert device.is_idle
            router.check()
            for layer, got in enumerate(out):
                assert_close(got, some.expected(layer))
                got.zero_()
    for server in rig.servers:
        assert server.stats.messages == 2 * 3 * LAYERS
        assert server.stats.joined > 0  # both routers ask for the same layers at the same time
        assert server.stats.jobs < server.stats.messages


def test_sums_that_wrap_around_on_the_device_are_added_before_they_do_twice(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ipc_server, "ADD_EVERY", 1)
    tokens, server = Tokens.random(5, experts=EXPERTS // 2), rig.servers[0]
    counted = server._desk.words[layout.COUNTED + layout.TOKENS :][:1]
    for _ in range(4):  # as after 2^31 rows more
        counted += -(1 << 31)
        tokens.send(rig.routers[0], 0)
        rig.serve()
        tokens.send(rig.routers[0], 1)  # launched when the sums before have come
        rig.serve()
    assert server.stats.tokens == 4 * (1 << 31) + 8 * 5


def test_padding_is_neither_sent_nor_counted(rig: Rig) -> None:
    router, tokens = rig.routers[0], Tokens.random(8)
    router.begin_step(3, 2)
    got = tokens.send(router, 1)
    rig.serve()
    assert_close(got[:3], tokens.expected(1)[:3])
    assert not got[3:].any()
    counts = router.take_carried().pairs
    for phase, rows in ((1, slice(0, 2)), (0, slice(2, 3))):
        wanted = np.bincount(tokens.ids[rows].numpy().ravel(), minlength=EXPERTS)
        assert np.array_equal(counts[phase, 1], wanted)
    assert counts.sum() == 3 * 2
    assert not router.take_carried().pairs.any()


def test_a_shard_without_tokens_has_nothing_to_answer(rig: Rig) -> None:
    tokens = Tokens.random(4, experts=EXPERTS // 2)  # all of them lie on shard 0
    got = tokens.send(rig.routers[0], 0)
    rig.serve()
    assert_close(got, tokens.expected(0))
    assert [server.stats.messages for server in rig.servers] == [1, 0]


def test_messages_longer_than_a_job(block: MailboxBlock) -> None:
    rig = Rig(block, num_routers=3)
    tokens = [Tokens.random(16, seed) for seed in range(3)]
    outs = [some.send(router, 1) for some, router in zip(tokens, rig.routers, strict=True)]
    rig.serve()
    for some, got in zip(tokens, outs, strict=True):
        assert_close(got, some.expected(1))
    rig.close()


def test_small_jobs_that_wait_leave_a_large_message_to_one_of_its_size(
    block: MailboxBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experts' weights are not read again for every piece of it; another router's small one is answered before."""
    sizes: list[int] = []
    run = SimulatedExperts._run

    def noted(self: SimulatedExperts, job: Job, capacity: int, out: torch.Tensor) -> None:
        sizes.append(int(job.num_tokens))
        run(self, job, capacity, out)

    monkeypatch.setattr(SimulatedExperts, "_run", noted)
    rig = Rig(block, num_routers=2, limits=AHEAD)
    small, large = Tokens.random(1), Tokens.random(14, 1)
    outs = [small.send(rig.routers[0], layer) for layer in range(2)]
    rig.serve()
    sizes.clear()
    assert not any(device.is_idle for device in rig.shard_devices), "small jobs wait"
    outs.append(large.send(rig.routers[1], 2))
    outs.append(small.send(rig.routers[0], 2))
    rig.serve()
    for got, some, layer in zip(outs, (small, small, large, small), (0, 1, 2, 2), strict=True):
        assert_close(got, some.expected(layer))
    rows = [int((large.ids // (EXPERTS // 2) == shard_idx).any(1).sum()) for shard_idx in range(2)]
    assert sorted(size for size in sizes if size > 1) == sorted(rows)
    rig.close()


def test_routers_come_and_go_while_others_are_served(rig: Rig) -> None:
    rig.servers[0].start()
    rig.servers[1].start()
    stop, failures = threading.Event(), []

    def advance() -> None:
        while not stop.is_set():
            rig.now = time.monotonic()
            if not [device for device in rig.shard_devices if device.step()]:
                time.sleep(0)

    def ask(router: IpcTransport, device: SimulatedDevice, seed: int) -> None:
        try:
            for turn in range(20):
                tokens = Tokens.random(1 + (turn + seed) % 12, turn)
                got = tokens.send(router, turn % LAYERS)
                device.synchronize()
                router.check()
                assert_close(got, tokens.expected(turn % LAYERS))
        except BaseException as error:
            failures.append(error)

    gpu = threading.Thread(target=advance)
    gpu.start()
    pairs = enumerate(zip(rig.routers, rig.devices, strict=True))
    askers = [threading.Thread(target=ask, args=(*pair, seed)) for seed, pair in pairs]
    for asker in askers:
        asker.start()
    for _ in range(5):
        guest = IpcTransport(SimulatedDevice(), rig.block, 2, message_shape(), PLACEMENT)
        for shard_idx, server in enumerate(rig.servers):
            guest.replace(shard_idx, server.attach(guest.handles))
        ask(guest, guest._device, 5)  # type: ignore[arg-type]
        for server in rig.servers:
            server.detach(2)
        guest.close()
    for asker in askers:
        asker.join()
    for server in rig.servers:
        server.stop()
    stop.set()
    gpu.join()
    assert not failures, failures
    assert [server.error for server in rig.servers] == [None, None]


def test_what_does_not_fit_is_refused_at_once(rig: Rig, block: MailboxBlock) -> None:
    device, router = SimulatedDevice(), rig.routers[0]
    with pytest.raises(OptionError, match="router 3 with 2 shards, the mailboxes are of 3 routers"):
        IpcTransport(device, block, 3, message_shape(), PLACEMENT)
    with pytest.raises(OptionError, match="65 choices per token"):
        IpcTransport(device, block, 2, message_shape(top_k=65), PLACEMENT)
    with pytest.raises(PlacementError, match=r"\(3, 8, 4\)"):
        router.set_placement(even_split(LAYERS, EXPERTS, 4))
    with pytest.raises(ValueError, match="17 rows in a call, expected at most 16"):
        Tokens.random(17).send(router, 0)
    other = IpcTransport(device, block, 2, message_shape(max_tokens=8), PLACEMENT)
    with pytest.raises(TransportError, match="router 2 sends"):
        rig.servers[0].attach(other.handles)
    other.close()


def test_bytes_are_those_of_the_buffers(rig: Rig) -> None:
    message = message_shape()
    assert rig.routers[0].buffer_bytes > message.return_bytes(2) >= 2 * 16 * 128 * 4
    before = rig.servers[0].buffer_bytes
    rig.servers[0].detach(1)
    assert before - rig.servers[0].buffer_bytes == message.inbox_bytes >= 16 * 128 * 2


def test_jobs_go_ahead_of_messages_until_there_is_a_pause(rig: Rig) -> None:
    tokens, router = Tokens.random(5), rig.routers[0]
    assert not rig.servers[0].poll() and rig.shard_devices[0].is_idle
    got = tokens.send(router, 0)
    rig.serve()
    assert_close(got, tokens.expected(0))
    is_ahead = rig.limits is AHEAD
    assert rig.shard_devices[0].is_idle is not is_ahead
    launches = rig.servers[0].stats.launches
    got = tokens.send(router, 1)
    rig.devices[0].run()
    for device in rig.shard_devices:
        device.run()
    rig.devices[0].run()
    assert rig.devices[0].is_idle is is_ahead  # no host had a part in it
    assert rig.servers[0].stats.launches == launches
    rig.serve()
    router.check()
    assert_close(got, tokens.expected(1))
    rig.now += 2.0
    for _ in range(AHEAD.patience + 4 * AHEAD.depth):  # looks of the first one, then every op of all
        rig.shard_devices[0].step()
    assert rig.shard_devices[0].is_idle and not rig.servers[0].poll()
    got = tokens.send(router, 2)
    rig.serve()
    assert_close(got, tokens.expected(2))


def test_routers_in_step_are_waited_for(block: MailboxBlock) -> None:
    rig = Rig(block, num_routers=2, limits=replace(LIMITS, window=3))
    tokens = [Tokens.random(2, 1), Tokens.random(3, 2)]

    def ask(router_idx: int, layer_pos: int) -> torch.Tensor:
        got = tokens[router_idx].send(rig.routers[router_idx], layer_pos)
        rig.devices[router_idx].run()
        for server in rig.servers:
            server.poll()
        return got

    def look(times: int) -> None:
        for device in rig.shard_devices:
            for _ in range(times):
                device.step()

    def finish() -> None:
        for device in rig.shard_devices:
            device.run()
        rig.serve()

    for router_idx in range(2):
        ask(router_idx, 0)
    finish()
    joined = [server.stats.joined for server in rig.servers]
    first = ask(0, 1)
    look(3)
    assert not rig.devices[0].is_idle  # each shard has a job for it that still waits for the other router
    second = ask(1, 1)
    finish()
    assert [server.stats.joined for server in rig.servers] == [before + 2 for before in joined]
    for got, some in zip((first, second), tokens, strict=True):
        assert_close(got, some.expected(1))
    ask(0, 2)
    look(3 + 1)
    assert not rig.devices[0].is_idle
    look(CREDIT * 3 * (LAYERS + 2) // 2)  # in vain
    rig.devices[0].run()
    assert rig.devices[0].is_idle
    ask(0, 0)
    look(1 + 5)  # it has not come back since
    rig.devices[0].run()
    assert rig.devices[0].is_idle
    rig.close()

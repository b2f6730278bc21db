"""The host side of the ipc data plane on a simulated GPU: who serves what when, and how a wait ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import pytest
import torch

from ep import ipc_server
from ep.errors import DeadlineError, OptionError, PlacementError, ShardFailedError, ShardLostError, TransportError
from ep.ipc_jobs import IpcLimits
from ep.ipc_server import IpcServer
from ep.kernels import p2p_layout as layout
from ep.kernels.p2p import Job
from ep.placement import Placement, even_split
from ep.transport.ipc import IpcTransport
from ep.transport.ipc_watch import STUCK_S, WATCH_S
from ep.transport.mailbox import MailboxBlock
from tests.unit.simulated import SimulatedDevice, SimulatedExperts, factors, message_shape

LAYERS, EXPERTS = 3, 8
PLACEMENT = even_split(LAYERS, EXPERTS, 2)
LIMITS = IpcLimits(job_tokens=16, graph_tokens=8)
AHEAD = IpcLimits(job_tokens=16, graph_tokens=8, depth=3, linger_s=1.0, patience=4)
"""Jobs wait on the device for messages; time stands still."""
_names = count()


@pytest.fixture
def block() -> Iterator[MailboxBlock]:
    block = MailboxBlock.open(f"test-{time.time_ns()}-{next(_names)}", 3, 2)
    yield block
    block.close()


class Rig:
    """Shards and routers of one block, connected pairwise."""

    def __init__(
        self, block: MailboxBlock, num_routers: int = 1, deadline_s: float = 30.0, limits: IpcLimits = LIMITS
    ) -> None:
        self.block, self.limits, self.now = block, limits, 0.0
        self.served = {0}
        self.shard_devices = [SimulatedDevice() for _ in range(2)]
        self.servers = [self.make_server(shard_idx) for shard_idx in range(2)]
        self.devices = [SimulatedDevice() for _ in range(num_routers)]
        self.routers = [
            IpcTransport(device, block, router_idx, message_shape(), PLACEMENT, deadline_s=deadline_s)
            for router_idx, device in enumerate(self.devices)
        ]
        for router in self.routers:
            for shard_idx, server in enumerate(self.servers):
                router.replace(shard_idx, server.attach(router.handles))

    def make_server(self, shard_idx: int) -> IpcServer:
        device = self.shard_devices[shard_idx]
        experts = SimulatedExperts(device, PLACEMENT, shard_idx)
        server = IpcServer(
            device, self.block, shard_idx, message_shape(), LAYERS, experts, lambda: self.served, self.limits,
            clock=lambda: self.now,
        )  # fmt: skip
        server.capture()
        return server

    def serve(self) -> None:
        """Everything that can go on goes on, until nothing does."""
        for _ in range(1000):
            for device in self.devices:
                device.run()
            found = [server.poll() for server in self.servers]
            if not any(found):
                return
            for device in self.shard_devices:
                device.run()
        raise AssertionError("it never ends")

    def close(self) -> None:
        for router in self.routers:
            router.close()


@pytest.fixture(params=[LIMITS, AHEAD], ids=["asked", "ahead"])
def rig(block: MailboxBlock, request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(block, num_routers=2, limits=request.param)
    yield rig
    rig.close()


@dataclass
class Tokens:
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def random(cls, num_tokens: int, seed: int = 0, experts: int = EXPERTS) -> Tokens:
        generator = torch.Generator().manual_seed(seed)
        return cls(
            torch.randn(num_tokens, 128, generator=generator).bfloat16(),
            torch.rand(num_tokens, experts, generator=generator).topk(2).indices.int(),
            torch.rand(num_tokens, 2, generator=generator),
        )

    def expected(self, layer_pos: int) -> torch.Tensor:
        scale = factors(LAYERS, EXPERTS)[layer_pos][self.ids.long()] * self.weights
        return self.hidden.float() * scale.sum(1, keepdim=True)

    def send(self, router: IpcTransport, layer_pos: int) -> torch.Tensor:
        router.dispatch(layer_pos, self.hidden, self.ids, self.weights)
        return router.combine()


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got.float(), expected, rtol=1e-2, atol=1e-3)


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
    compute = server._compute

    def slow(job: Job, capacity: int, out: torch.Tensor) -> None:
        rig.now += 5.0
        seen.append(server.launching_s)
        compute(job, capacity, out)

    server._compute = slow
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
    look(3 + 5)  # in vain
    rig.devices[0].run()
    assert rig.devices[0].is_idle
    ask(0, 0)
    look(1 + 5)  # it has not come back since
    rig.devices[0].run()
    assert rig.devices[0].is_idle
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

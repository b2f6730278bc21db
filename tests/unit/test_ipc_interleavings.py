"""Two routers and two shards on simulated GPUs, in every order that hypothesis can think of: whatever happens, a step
that passes its check has every token's sum of every expert, and everything ends."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ep.errors import ShardFailedError, ShardLostError
from ep.ipc_jobs import IpcLimits
from ep.ipc_server import IpcServer
from ep.kernels.p2p import CREDIT
from ep.kernels.p2p_layout import pack_header
from ep.placement import Placement
from ep.transport.ipc import IpcTransport
from ep.transport.mailbox import MailboxBlock
from tests.unit.p2p_cases import make_tables
from tests.unit.simulated import SimulatedDevice, SimulatedExperts, factors, message_shape

LAYERS, EXPERTS, SLOTS, TOP_K, MAX_TOKENS = 2, 6, 5, 2, 5
ROUTERS = SHARDS = st.integers(0, 1)


def make_placements() -> list[Placement]:
    """Two that differ in where experts and replicas lie."""
    found = []
    for generation in range(2):
        tables = make_tables(LAYERS, EXPERTS, 2, SLOTS, seed=generation)
        slots = torch.full((LAYERS, 2 * SLOTS), -1, dtype=torch.int32)
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                chosen = tables.replicas[layer, expert, : tables.num_replicas[layer, expert]]
                slots[layer, chosen.long()] = expert
        found.append(Placement(generation, EXPERTS, slots.view(LAYERS, 2, SLOTS).numpy()))
    return found


PLACEMENTS = make_placements()


@dataclass
class Step:
    """What a router has been asked for: the sums of its layers, and what they must be."""

    outs: list[torch.Tensor] = field(default_factory=list)
    expected: list[torch.Tensor] = field(default_factory=list)


class Interleavings(RuleBasedStateMachine):
    @initialize(first_seq=st.sampled_from([0, 2**31 - 3, -2]), is_ahead=st.booleans())
    def begin(self, first_seq: int, is_ahead: bool) -> None:
        """is_ahead: jobs are launched before the messages that they are for."""
        self.limits = IpcLimits(job_tokens=3, graph_tokens=2)
        if is_ahead:
            self.limits = replace(self.limits, depth=2, linger_s=1.0, patience=3, window=2)
        self.now = 0.0
        self.block = MailboxBlock.open(f"test-{time.time_ns()}", 2, 2)
        self.generation = 0
        self.served = {0}
        self.experts: dict[int, SimulatedExperts] = {}
        self.shard_devices = [SimulatedDevice() for _ in range(2)]
        self.servers: list[IpcServer | None] = [self.make_server(shard) for shard in range(2)]
        self.devices = [SimulatedDevice() for _ in range(2)]
        self.routers = [self.make_router(idx, first_seq) for idx in range(2)]
        self.steps: list[Step | None] = [None, None]
        self.is_broken = [False, False]

    def make_router(self, router_idx: int, first_seq: int) -> IpcTransport:
        router = IpcTransport(
            self.devices[router_idx], self.block, router_idx, message_shape(MAX_TOKENS), PLACEMENTS[self.generation]
        )
        router._words[0] = first_seq
        self.block.headers[router_idx] = pack_header(first_seq, 0, 0)  # the last one of many
        for shard_idx, server in enumerate(self.servers):
            if server is not None:
                router.replace(shard_idx, server.attach(router.handles))
        return router

    def make_server(self, shard_idx: int) -> IpcServer:
        device = self.shard_devices[shard_idx] = SimulatedDevice()
        experts = self.experts[shard_idx] = SimulatedExperts(device, PLACEMENTS[self.generation], shard_idx)
        server = IpcServer(
            device, self.block, shard_idx, message_shape(MAX_TOKENS), LAYERS, experts, lambda: self.served,
            self.limits, clock=lambda: self.now,
        )  # fmt: skip
        server.capture()
        return server

    @precondition(lambda self: not any(self.is_broken) and None in self.steps)
    @rule(layers=st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=4), tokens=st.integers(1, MAX_TOKENS),
          seed=st.integers(0, 99), from_graph=st.booleans())  # fmt: skip
    def start_step(self, layers: list[int], tokens: int, seed: int, from_graph: bool) -> None:
        """On a router that has none."""
        router = self.steps.index(None)
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, 128, generator=generator).bfloat16()
        ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices.int()
        weights = torch.rand(tokens, TOP_K, generator=generator)
        step, transport = Step(), self.routers[router]

        def launch() -> None:
            for layer in layers:
                transport.dispatch(layer, hidden, ids, weights)
                step.outs.append(transport.combine())

        if from_graph:
            self.devices[router].capture(launch)()
        else:
            launch()
        scales = factors(LAYERS, EXPERTS)
        for layer in layers:
            step.expected.append(hidden.float() * (scales[layer][ids.long()] * weights).sum(1, keepdim=True))
        self.steps[router] = step

    @precondition(lambda self: self.steps != [None, None])
    @rule(moves=st.binary(min_size=8, max_size=64))
    def go_on(self, moves: bytes) -> None:
        """One op of a GPU, or one look of a shard's thread, after the other."""
        for move in moves:
            kind, idx = move % 7 % 4, move % 2
            server = self.servers[idx]
            if kind == 3:
                self.now += 0.2
            elif kind == 0:
                self.devices[idx].step()
                self.finish(idx)
            elif kind == 1:
                self.shard_devices[idx].step()
            elif server is not None:
                server.poll()

    @precondition(lambda self: self.steps != [None, None])
    @rule()
    def finish_all(self) -> None:
        self.drain()

    @precondition(lambda self: not any(self.is_broken) and self.steps != [None, None])
    @rule(shard=SHARDS)
    def kill(self, shard: int) -> None:
        """What it had launched never runs; routers that wait for it learn of it."""
        self.servers[shard] = None
        self.shard_devices[shard] = SimulatedDevice()
        for router, step in enumerate(self.steps):
            self.is_broken[router] = True
            if step is not None:
                self.routers[router].abort(shard, "killed")

    @precondition(lambda self: any(self.is_broken) and self.steps == [None, None])
    @rule()
    def recover(self) -> None:
        """A successor for every shard that is gone; between steps, as the cluster does it."""
        for shard, server in enumerate(self.servers):
            if server is None:
                successor = self.servers[shard] = self.make_server(shard)
                for transport in self.routers:
                    transport.replace(shard, successor.attach(transport.handles))
        for transport in self.routers:
            transport.reset()
        self.is_broken = [False, False]

    @precondition(lambda self: self.steps == [None, None])
    @rule()
    def change_placement(self) -> None:
        """All shards are done with the old one: its slots are filled anew."""
        self.generation = 1 - self.generation
        self.served = {self.generation}
        for experts in self.experts.values():
            experts.fill(PLACEMENTS[self.generation])
        for transport in self.routers:
            transport.set_placement(PLACEMENTS[self.generation])

    @precondition(lambda self: self.steps != [None, None])
    @rule(router=ROUTERS)
    def rejoin(self, router: int) -> None:
        """A router that leaves, in the midst of a step or not, and another one in its place."""
        self.devices[router] = SimulatedDevice()
        for server in self.servers:
            if server is not None:
                server.detach(router)
        self.routers[router].close()
        self.steps[router] = None
        self.routers[router] = self.make_router(router, 0)
        self.is_broken[router] = None in self.servers

    @precondition(lambda self: not any(self.is_broken) and None in self.steps)
    @rule()
    def refuse(self) -> None:
        """A router that goes on with a placement that no shard serves any more."""
        router = self.steps.index(None)
        transport = self.routers[router]
        transport.set_placement(Placement(5, EXPERTS, PLACEMENTS[self.generation].slots))
        transport.dispatch(0, torch.ones(1, 128).bfloat16(), torch.tensor([[0, 1]]).int(), torch.ones(1, 2))
        transport.combine()
        self.drain()
        try:
            transport.check()
            raise AssertionError("nobody refused")
        except ShardFailedError as error:
            assert "generation 5" in str(error)
        transport.reset()
        transport.set_placement(PLACEMENTS[self.generation])

    def finish(self, router: int) -> None:
        """If its stream is done: a step that passes its check is right in every token."""
        step = self.steps[router]
        if step is None or not self.devices[router].is_idle:
            return
        self.steps[router] = None
        try:
            self.routers[router].check()
        except ShardLostError as error:
            assert self.is_broken[router] and "killed" in str(error)
            return
        for got, wanted in zip(step.outs, step.expected, strict=True):
            torch.testing.assert_close(got.float(), wanted, rtol=1e-2, atol=1e-3)

    def drain(self) -> None:
        """Everything goes on until nothing does, and then time passes until jobs that wait give up."""
        stands, longest = 0, 10 + CREDIT * self.limits.window * (LAYERS + 2)
        while stands < longest:
            moved = [device.step() for device in (*self.devices, *self.shard_devices)]
            moved += [server.poll() for server in self.servers if server is not None]
            if not any(moved):
                stands += 1
                self.now += 2.0
                for transport in self.routers:
                    transport._watch.look()
        assert all(device.is_idle for device in (*self.devices, *self.shard_devices)), "something waits for ever"
        for router in range(2):
            self.finish(router)

    @invariant()
    def jobs_on_a_device_are_few(self) -> None:
        for device in getattr(self, "shard_devices", []):
            assert len(device._queue) <= 4 * 2 * self.limits.depth

    def teardown(self) -> None:
        if not hasattr(self, "block"):
            return
        self.drain()
        for transport in self.routers:
            transport.close()
        self.block.close()


Interleavings.TestCase.settings = settings(max_examples=50, stateful_step_count=50, deadline=None)
TestInterleavings = Interleavings.TestCase

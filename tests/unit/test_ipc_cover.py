"""A router that launches its layers one by one beside a shard of its process goes on once devices alone can finish."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep.ipc_jobs import RETRY_S, IpcLimits
from ep.kernels.p2p import Job
from ep.transport.mailbox import MailboxBlock
from tests.unit.ipc_rig import AHEAD, LAYERS, LIMITS, Rig, Tokens, assert_close, open_block
from tests.unit.simulated import SimulatedExperts


def finish_alone(rig: Rig) -> None:
    """Without any host."""
    for _ in range(500):
        for device in (*rig.devices, *rig.shard_devices):
            device.step()
    assert rig.devices[0].is_idle, "a host would have a part in it"


@settings(max_examples=60, deadline=None)
@given(
    is_ahead=st.booleans(), moves=st.binary(min_size=6, max_size=60),
    steps=st.lists(st.tuples(st.integers(1, 16), st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=4),
                             st.booleans()), min_size=1, max_size=5),
)  # fmt: skip
def test_once_it_goes_on_devices_alone_finish(
    is_ahead: bool, moves: bytes, steps: list[tuple[int, list[int], bool]]
) -> None:
    with open_block() as block:
        rig = Rig(block, limits=AHEAD if is_ahead else LIMITS)
        router, device, turn = rig.routers[0], rig.devices[0], cycle(moves)
        places: list[Callable[[], object]] = [device.step, *(each.step for each in rig.shard_devices)]
        places += [server.poll for server in rig.servers]

        def hold(until: Callable[[], bool]) -> None:
            for number in range(10_000):
                if until():
                    return
                move = next(turn) % (len(places) + 1)
                if move < len(places):
                    places[move]()
                else:
                    rig.now += 0.3
                for place in places if number % 16 == 15 else ():  # whatever the moves are, nobody stands for ever
                    place()
            raise AssertionError("it never goes on")

        device.hold = hold  # type: ignore[method-assign]
        outs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for seed, (num_rows, layers, is_graph) in enumerate(steps):
            tokens = Tokens.random(num_rows, seed)
            router.begin_step(num_rows, num_rows, seed + 1)

            def launch(tokens: Tokens = tokens, layers: list[int] = layers) -> None:
                outs.extend((tokens.send(router, layer), tokens.expected(layer)) for layer in layers)

            if is_graph:
                device.capture(launch)()
            else:
                launch()
                finish_alone(rig)
        rig.serve()
        router.check()
        for got, expected in outs:
            assert_close(got, expected)
        rig.close()


def test_a_step_has_jobs_of_its_size_before_its_first_message(
    block: MailboxBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that waited for smaller ones leave it to them, and small ones follow again."""
    sizes: list[tuple[int, int]] = []
    run = SimulatedExperts._run

    def noted(self: SimulatedExperts, job: Job, capacity: int, out: torch.Tensor) -> None:
        if int(job.num_tokens):
            sizes.append((int(job.num_tokens), capacity))
        run(self, job, capacity, out)

    monkeypatch.setattr(SimulatedExperts, "_run", noted)
    rig = Rig(block, limits=AHEAD)
    router, device = rig.routers[0], rig.devices[0]
    for num_tokens in (2, 15, 1):
        tokens = Tokens.random(num_tokens, num_tokens)
        router.begin_step(num_tokens, num_tokens)
        device.run()
        for _ in range(AHEAD.depth):
            for server in rig.servers:
                server.poll()
        sizes.clear()
        got = tokens.send(router, 0)
        finish_alone(rig)
        assert_close(got, tokens.expected(0))
        assert len(sizes) == 2 and all(capacity >= rows for rows, capacity in sizes), sizes
        rig.serve()
    rig.close()


def test_a_job_that_may_have_looked_already_is_no_answer(block: MailboxBlock) -> None:
    rig = Rig(block, limits=IpcLimits(job_tokens=16, graph_tokens=8, depth=1, linger_s=1.0, patience=1))
    router, device, seen = rig.routers[0], rig.devices[0], []
    device.hold = seen.append  # type: ignore[method-assign]
    tokens = Tokens.random(2)
    router.begin_step(2, 2)
    device.run()
    for server, shard in zip(rig.servers, rig.shard_devices, strict=True):
        assert server.poll()
        assert shard.step() and not shard.is_idle  # it has looked, in vain
    got = tokens.send(router, 0)
    device.run()
    for server, shard in zip(rig.servers, rig.shard_devices, strict=True):
        assert server.poll() and not seen[0]()
        shard.run()
        assert shard.is_idle and not server.poll()
        rig.now += RETRY_S
        assert server.poll()
    assert seen[0]()
    finish_alone(rig)
    assert_close(got, tokens.expected(0))
    rig.close()


def test_the_wait_for_an_answer_to_be_launched_ends_with_the_router_s_waits(rig: Rig) -> None:
    seen: list[bool] = []
    rig.devices[0].hold = lambda until: seen.append(until())  # type: ignore[method-assign]
    router = rig.routers[0]
    Tokens.random(3).send(router, 0)
    rig.devices[0].run()
    Tokens.random(3).send(router, 1)
    assert seen == [False, False]
    rig.devices[0].hold = lambda until: seen.append((rig.devices[0].run(), until())[1])  # type: ignore[method-assign]
    router.abort(1, "killed")
    Tokens.random(3).send(router, 1)
    assert seen[-1]

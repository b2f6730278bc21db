"""Experts that move between real shards, over real sockets, while a router uses them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from ep.checkpoint import Checkpoint
from ep.errors import ClusterError, ShardFailedError, ShardLostError, WireError
from ep.kernels import cpu_ops
from ep.kernels.reference import Experts, experts_forward
from ep.migration import DISK, Step, Transfer, plan_steps
from ep.mover import Moved, Mover
from ep.placement import Placement, even_split, with_spares
from ep.planning.plan import plan
from ep.planning.request import PlanRequest
from ep.router import Router
from ep.shard import Shard
from ep.transport.base import Endpoint
from ep.transport.handshake import Greeting
from ep.transport.peer import Peer
from ep.transport.sockets import SocketTransport
from tests.cases import small_checkpoint, small_config
from tests.unit.shards import KEY, NODE, relative_error

NUM_SHARDS, NUM_TOKENS, MAX_TOKENS = 3, 24, 64


@dataclass
class Rig:
    checkpoint: Checkpoint
    shards: list[Shard]
    endpoints: list[Endpoint]
    movers: list[Mover]
    router: Router
    dense: list[Experts]

    def prepare(self, step: Step) -> list[Moved]:
        return [
            mover.prepare(step.placement, [t for t in step.transfers if t.to_shard == idx], self.endpoints)
            for idx, mover in enumerate(self.movers)
        ]

    def error(self) -> float:
        """Of the router's answer in the last MoE layer."""
        spec = self.checkpoint.spec
        generator = torch.Generator().manual_seed(3)
        hidden = torch.randn(NUM_TOKENS, spec.hidden_size, generator=generator).bfloat16()
        weights, ids = torch.rand(NUM_TOKENS, spec.num_experts, generator=generator).topk(spec.top_k, dim=-1)
        layer_pos = spec.num_moe_layers - 1
        got = self.router.moe(layer_pos, hidden, ids.int(), weights)
        return relative_error(got, experts_forward(hidden.double(), ids.int(), weights, self.dense[layer_pos]))


@pytest.fixture(params=["mixtral", "deepseek_v3", "deepseek_v3-fp8"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    family, _, kept = request.param.partition("-")
    changes = {"hidden_size": 256, "num_local_experts": 9} if family == "mixtral" else {"hidden_size": 256}
    if kept and not cpu_ops.supports("fp8", 256, 128, (128, 128))[0]:
        pytest.skip("no FP8 experts on this CPU")
    config = small_config(family, num_hidden_layers=3, **changes)
    checkpoint = Checkpoint(small_checkpoint(tmp_path / "model", family, config))
    spec = checkpoint.spec
    placement = with_spares(even_split(spec.num_moe_layers, spec.num_experts, NUM_SHARDS), 2)
    shards = [Shard.load(checkpoint, placement, idx, device="cpu", fp8=bool(kept) or None) for idx in range(NUM_SHARDS)]
    hosts = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    nodes = [NODE, NODE, "node-b"]  # the last one is reached over TCP
    endpoints = [
        shard.listen(KEY, node, host=host, unix_dir=tmp_path / "s")
        for shard, node, host in zip(shards, nodes, hosts, strict=True)
    ]
    movers = [Mover(shard, checkpoint, KEY, node, rest=0) for shard, node in zip(shards, nodes, strict=True)]
    transport = SocketTransport(endpoints, Greeting.of(spec, "router-0", MAX_TOKENS), KEY, NODE)
    dense = []
    for layer_idx in spec.moe_layers:
        slots = checkpoint.allocate_slots(spec.num_experts, torch.float32)
        checkpoint.read_slots(layer_idx, list(range(spec.num_experts)), slots)
        dense.append(Experts(slots.w13.double(), slots.w2.double()))
    router = Router(spec, placement, transport)
    yield Rig(checkpoint, shards, endpoints, movers, router, dense)
    router.close()
    for shard in shards:
        shard.close()


def steps_to_skewed_plan(rig: Rig) -> tuple[Step, ...]:
    current = rig.router.placement
    loads = np.random.default_rng(0).permuted(
        np.tile(1000 // np.arange(1, current.num_experts + 1), (current.num_moe_layers, 1)), axis=1
    )
    target = plan(loads, PlanRequest(NUM_SHARDS, 1, generation=1, previous=current)).placement
    steps = plan_steps(current, target, expert_bytes=1)
    assert steps and all(step.transfers for step in steps)
    return steps


def test_every_generation_computes_the_same(rig: Rig) -> None:
    assert rig.error() < 1e-2
    for step in steps_to_skewed_plan(rig):
        old = rig.router.placement
        moved = rig.prepare(step)
        assert sum(m.from_peers for m in moved) == len(step.transfers) and not sum(m.from_disk for m in moved)
        assert sum(m.probed for m in moved) == len(step.transfers)
        assert rig.error() < 1e-2  # by the old placement
        rig.router.set_placement(step.placement)
        assert rig.error() < 1e-2
        for shard in rig.shards:
            shard.drop(old.generation)
            assert shard.generations == [step.placement.generation]
        assert rig.error() < 1e-2


def test_what_no_shard_holds_comes_from_the_checkpoint(rig: Rig) -> None:
    (step, *_) = steps_to_skewed_plan(rig)
    transfers = tuple(Transfer(t.layer_pos, t.expert_idx, t.to_shard, t.to_slot, DISK, DISK) for t in step.transfers)
    moved = rig.prepare(Step(step.placement, transfers, step.num_bytes))
    assert sum(m.from_disk for m in moved) == len(transfers)
    rig.router.set_placement(step.placement)
    assert rig.error() < 1e-2


def test_a_peer_s_wrong_weights_never_serve(rig: Rig) -> None:
    """What arrives is what was sent, so only trying it against the checkpoint can tell."""
    (step, *_) = steps_to_skewed_plan(rig)
    transfer = step.transfers[0]
    source = rig.shards[transfer.from_shard]
    for part in source.slot_parts(transfer.layer_pos, transfer.from_slot):
        part.reshape(-1).view(torch.uint8).copy_(part.reshape(-1).view(torch.uint8).flip(0).clone())
    mover = rig.movers[transfer.to_shard]
    with pytest.raises(ClusterError, match=f"does not compute expert {transfer.expert_idx}"):
        mover.prepare(step.placement, [t for t in step.transfers if t.to_shard == transfer.to_shard], rig.endpoints)
    assert rig.shards[transfer.to_shard].generations == [0]


def test_a_peer_that_is_gone_leaves_the_old_generation_serving(rig: Rig) -> None:
    (step, *_) = steps_to_skewed_plan(rig)
    transfer = next(t for t in step.transfers if t.from_shard != t.to_shard)
    gone = list(rig.endpoints)
    was = gone[transfer.from_shard]
    gone[transfer.from_shard] = Endpoint(was.shard_idx, was.node_id, f"{was.unix_path}-gone", was.tcp_host, 1)
    with pytest.raises(ShardLostError, match=f"shard {transfer.from_shard}"):
        rig.movers[transfer.to_shard].prepare(step.placement, [transfer], gone)
    assert all(shard.generations == [0] for shard in rig.shards)
    assert rig.error() < 1e-2


def test_a_generation_that_was_not_prepared_is_refused(rig: Rig) -> None:
    placement = rig.router.placement
    rig.router.set_placement(Placement(7, placement.num_experts, placement.slots))
    with pytest.raises(ShardFailedError, match=r"generation is 7, expected one of \[0\]"):
        rig.error()


def test_bytes_that_are_not_there_end_the_connection(rig: Rig) -> None:
    greeting = Greeting.of(rig.checkpoint.spec, "curious", MAX_TOKENS)
    for layer_pos, slot_idx, offset in ((99, 0, 0), (0, 99, 0), (0, 0, 1 << 40)):
        peer = Peer(rig.endpoints[0], greeting, KEY, NODE)
        with pytest.raises(ShardLostError):
            peer.fetch(layer_pos, slot_idx, offset, 64)
        peer.close()
    deadline = time.monotonic() + 5
    while rig.shards[0].stats().dropped < 3 and time.monotonic() < deadline:  # counted just after the peer was told
        time.sleep(0.01)
    assert rig.shards[0].stats().dropped == 3
    assert rig.error() < 1e-2


def test_slots_packed_for_another_op_are_refused(tmp_path: Path) -> None:
    if not cpu_ops.supports("fp8", 256, 128, (128, 128))[0]:
        pytest.skip("only one way to compute on this CPU")
    config = small_config("deepseek_v3", hidden_size=256)
    checkpoint = Checkpoint(small_checkpoint(tmp_path / "model", "deepseek_v3", config))
    spec = checkpoint.spec
    placement = with_spares(even_split(spec.num_moe_layers, spec.num_experts, 2), 1)
    shards = [Shard.load(checkpoint, placement, idx, device="cpu", fp8=fp8) for idx, fp8 in enumerate((None, True))]
    endpoints = [shard.listen(KEY, NODE, unix_dir=tmp_path / "s") for shard in shards]
    transfer = Transfer(0, int(placement.slots[0, 0, 0]), 1, placement.slots_per_shard - 1, 0, 0)
    with pytest.raises((ClusterError, ShardLostError, WireError)):
        Mover(shards[1], checkpoint, KEY, NODE).prepare(placement, [transfer], endpoints)
    for shard in shards:
        shard.close()

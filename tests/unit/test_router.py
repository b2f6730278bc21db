"""The router against the reference, over every transport."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from ep.errors import OptionError, PlacementError, ShardFailedError, TransportError
from ep.kernels.reference import Experts
from ep.link_stats import NUM_ROUND_TRIPS
from ep.model import ModelSpec
from ep.placement import EMPTY, Placement, even_split
from ep.router import Router
from ep.shard import Shard
from ep.transport.base import Endpoint
from ep.transport.handshake import Greeting
from ep.transport.local import LocalTransport
from ep.transport.sockets import SocketTransport
from tests.unit.shards import (
    BF16_BOUND,
    KEY,
    NODE,
    NUM_EXPERTS,
    NUM_LAYERS,
    expected,
    make_experts,
    make_shard,
    make_spec,
    random_routing,
    relative_error,
)

BOUND = {"f32": 1e-5, "bf16": BF16_BOUND}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
MAX_TOKENS = 64


@dataclass
class Rig:
    """A router and its shards in this process, over one transport."""

    spec: ModelSpec
    experts: list[Experts]
    shards: list[Shard]
    router: Router

    def close(self) -> None:
        self.router.close()
        for shard in self.shards:
            shard.close()


def make_rig(
    way: str,
    placement: Placement,
    folder: Path,
    dtype: str = "bf16",
    dispatch_dtype: str | None = None,
    combine_dtype: str = "f32",
    spec: ModelSpec | None = None,
) -> Rig:
    spec = spec or make_spec()
    experts = make_experts(spec, DTYPES[dtype])
    shards = [make_shard(spec, placement, idx, experts) for idx in range(placement.num_shards)]
    transport: LocalTransport | SocketTransport
    if way == "local":
        transport = LocalTransport(shards, spec.hidden_size, spec.top_k, MAX_TOKENS)
    else:
        endpoints = [shard.listen(KEY, NODE, host="127.0.0.1", unix_dir=folder / "s") for shard in shards]
        node = NODE if way == "shm" else "node-b"
        transport = SocketTransport(endpoints, Greeting.of(spec, "router-0", MAX_TOKENS), KEY, node)
    return Rig(spec, experts, shards, Router(spec, placement, transport, dispatch_dtype or dtype, combine_dtype))


def split_over(num_shards: int) -> Placement:
    return even_split(NUM_LAYERS, NUM_EXPERTS, num_shards)


@pytest.fixture(
    params=[(way, num, dtype) for dtype in DTYPES for way in ("local", "shm", "tcp") for num in (1, 2, 4)],
    ids=lambda param: "-".join(map(str, param)),
)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    way, num_shards, dtype = request.param
    rig = make_rig(way, split_over(num_shards), tmp_path, dtype)
    yield rig
    rig.close()


def test_equals_reference(rig: Rig) -> None:
    dtype = rig.experts[0].w13.dtype
    for num_tokens in (0, 1, 2, 17, MAX_TOKENS, 150):
        for layer_pos, experts in enumerate(rig.experts):
            hidden, ids, weights = random_routing(rig.spec, num_tokens, seed=num_tokens)
            hidden = hidden.to(dtype)
            out = rig.router.moe(layer_pos, hidden, ids, weights)
            assert out.shape == hidden.shape and out.dtype == dtype
            assert relative_error(out, expected(experts, hidden, ids, weights)) <= BOUND[rig.router.dispatch_dtype]


@pytest.mark.parametrize("way", ["local", "shm", "tcp"])
def test_transports_and_repetitions_give_the_same_bits(way: str, tmp_path: Path) -> None:
    hidden, ids, weights = random_routing(make_spec(), 33)
    local = make_rig("local", split_over(4), tmp_path)
    wanted = local.router.moe(0, hidden.bfloat16(), ids, weights)
    rig = make_rig(way, split_over(4), tmp_path)
    for _ in range(10):
        assert torch.equal(rig.router.moe(0, hidden.bfloat16(), ids, weights), wanted)
    rig.close()


def test_one_shard_gives_the_bits_of_one_call(tmp_path: Path) -> None:
    """All experts on one shard: nothing is rounded but what the op itself rounds."""
    spec = make_spec()
    rig = make_rig("shm", split_over(1), tmp_path)
    hidden, ids, weights = random_routing(spec, 40)
    out = rig.router.moe(1, hidden.bfloat16(), ids, weights)
    alone = rig.shards[0].forward(1, hidden.bfloat16(), ids, weights)
    assert torch.equal(out, alone.bfloat16())
    rig.close()


@pytest.mark.parametrize("way", ["local", "shm", "tcp"])
def test_all_tokens_on_one_shard_leave_the_others_alone(way: str, tmp_path: Path) -> None:
    rig = make_rig(way, split_over(2), tmp_path)
    hidden, _, weights = random_routing(rig.spec, 9)
    ids = torch.arange(4, 8, dtype=torch.int32).expand(9, 4).contiguous()
    out = rig.router.moe(0, hidden.bfloat16(), ids, weights)
    assert relative_error(out, expected(rig.experts[0], hidden.bfloat16(), ids, weights)) <= BOUND["bf16"]
    assert [link.requests for link in rig.router.stats()] == [0, 1]
    rig.close()


@pytest.mark.parametrize("way", ["local", "shm", "tcp"])
@pytest.mark.parametrize("hidden_size", [64, 256, 416])
def test_fp8_dispatch_stays_within_its_error(way: str, hidden_size: int, tmp_path: Path) -> None:
    """e4m3 has 3 bits of mantissa: a value is off by at most 1/16, a sum of many by much less."""
    spec = make_spec(hidden_size)
    rig = make_rig(way, split_over(2), tmp_path, dispatch_dtype="fp8", spec=spec)
    hidden, ids, weights = random_routing(spec, 23)
    out = rig.router.moe(0, hidden.bfloat16(), ids, weights)
    wanted = expected(rig.experts[0], hidden.bfloat16(), ids, weights)
    assert BOUND["bf16"] < relative_error(out, wanted) <= 8e-2
    bytes_out = sum(link.bytes_out for link in rig.router.stats())
    rig.router.dispatch_dtype = "bf16"
    rig.router.moe(0, hidden.bfloat16(), ids, weights)
    if hidden_size >= 256 and way != "local":
        assert bytes_out < 0.75 * (sum(link.bytes_out for link in rig.router.stats()) - bytes_out)
    rig.close()


@pytest.mark.parametrize("way", ["local", "shm", "tcp"])
def test_bf16_combine(way: str, tmp_path: Path) -> None:
    rig = make_rig(way, split_over(2), tmp_path, combine_dtype="bf16")
    hidden, ids, weights = random_routing(rig.spec, 23)
    out = rig.router.moe(0, hidden.bfloat16(), ids, weights)
    assert relative_error(out, expected(rig.experts[0], hidden.bfloat16(), ids, weights)) <= 1.5e-2
    rig.close()


def test_replicas_and_empty_slots(tmp_path: Path) -> None:
    slots = np.array([[0, 1, 2, 3, 4], [4, 5, 6, 7, 0], [0, 7, EMPTY, EMPTY, EMPTY]], dtype=np.int32)
    placement = Placement(0, NUM_EXPERTS, np.broadcast_to(slots, (NUM_LAYERS, *slots.shape)))
    rig = make_rig("shm", placement, tmp_path)
    hidden, ids, weights = random_routing(rig.spec, 50)
    out = rig.router.moe(1, hidden.bfloat16(), ids, weights)
    assert relative_error(out, expected(rig.experts[1], hidden.bfloat16(), ids, weights)) <= BOUND["bf16"]
    assert all(link.pairs for link in rig.router.stats())
    assert sum(link.pairs for link in rig.router.stats()) == 50 * rig.spec.top_k
    rig.close()


def test_overlap_runs_between_dispatch_and_combine(tmp_path: Path) -> None:
    rig = make_rig("shm", split_over(2), tmp_path)
    hidden, ids, weights = random_routing(rig.spec, 8)
    hidden = hidden.bfloat16()
    routed = rig.router.moe(0, hidden, ids, weights)
    shared = torch.randn(8, rig.spec.hidden_size).bfloat16()
    assert torch.equal(rig.router.moe(0, hidden, ids, weights, overlap=lambda: shared), routed + shared)
    assert torch.equal(rig.router.moe(0, hidden, ids, weights, overlap=lambda: None), routed)
    assert rig.router.moe(0, hidden[:0], ids[:0], weights[:0], overlap=lambda: shared[:0]).shape == (0, 64)

    def fail() -> torch.Tensor:
        raise ValueError("shared expert")

    with pytest.raises(ValueError, match="shared expert"):
        rig.router.moe(1, hidden, ids, weights, overlap=fail)
    assert torch.equal(rig.router.moe(0, hidden, ids, weights), routed)
    rig.close()


def test_two_routers_at_once_get_their_own_answers(tmp_path: Path) -> None:
    """Their requests for one layer are joined at the shard; neither sees the other's tokens."""
    rig = make_rig("shm", split_over(2), tmp_path)
    endpoints = [link.endpoint for link in rig.router._transport._links]  # type: ignore[attr-defined]
    routers = [rig.router] + [
        Router(rig.spec, split_over(2), SocketTransport(endpoints, Greeting.of(rig.spec, name, 32), KEY, node))
        for name, node in (("a", NODE), ("b", "node-b"), ("c", NODE))
    ]
    inputs = [random_routing(rig.spec, 20, seed) for seed in range(len(routers))]
    wanted = [expected(rig.experts[0], hidden.bfloat16(), ids, weights) for hidden, ids, weights in inputs]
    alone = [rig.router.moe(0, hidden.bfloat16(), ids, weights) for hidden, ids, weights in inputs]
    wrong: list[int] = []

    def work(idx: int) -> None:
        hidden, ids, weights = inputs[idx]
        for _ in range(50):
            out = routers[idx].moe(0, hidden.bfloat16(), ids, weights)
            if not torch.equal(out, alone[idx]) or relative_error(out, wanted[idx]) > BOUND["bf16"]:
                wrong.append(idx)

    threads = [threading.Thread(target=work, args=(idx,)) for idx in range(len(routers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    stats = [shard.stats() for shard in rig.shards]
    assert all(stat.connections == 4 and stat.failed == 0 and stat.dropped == 0 for stat in stats)
    for router in routers[1:]:
        router.close()
    rig.close()


def test_stats_count_what_was_sent(tmp_path: Path) -> None:
    rig = make_rig("tcp", split_over(2), tmp_path)
    for step in range(3):
        hidden, ids, weights = random_routing(rig.spec, 10, seed=step)
        rig.router.moe(0, hidden.bfloat16(), ids, weights)
    links = rig.router.stats()
    shards = [shard.stats() for shard in rig.shards]
    assert sum(link.pairs for link in links) == 3 * 10 * rig.spec.top_k
    for link, shard in zip(links, shards, strict=True):
        assert (link.tokens, link.pairs, link.requests) == (shard.tokens, shard.pairs, shard.requests)
        assert (link.bytes_out, link.bytes_in) == (shard.bytes_in, shard.bytes_out)
        assert shard.tokens_of_layer == [shard.tokens, 0]
        recent = link.to_dict()["round_trips_us"]
        assert len(recent) == 3 <= NUM_ROUND_TRIPS and min(recent) > 0
        assert 0 < link.compute_ns == shard.compute_ns
    rig.close()


def test_a_placement_for_other_shards_is_refused(tmp_path: Path) -> None:
    rig = make_rig("local", split_over(2), tmp_path)
    with pytest.raises(PlacementError, match="4 shards and 2 MoE layers, expected 2 and 2"):
        rig.router.set_placement(split_over(4))
    with pytest.raises(PlacementError, match="2 shards and 3 MoE layers"):
        rig.router.set_placement(even_split(3, NUM_EXPERTS, 2))


def test_a_placement_that_the_shards_do_not_hold_is_an_error_of_the_call(tmp_path: Path) -> None:
    rig = make_rig("local", split_over(2), tmp_path)
    rig.router.set_placement(even_split(NUM_LAYERS, NUM_EXPERTS, 2, generation=1))
    hidden, ids, weights = random_routing(rig.spec, 3)
    with pytest.raises(ShardFailedError, match="shard 0: placement generation is 1, expected one of \\[0\\]"):
        rig.router.moe(0, hidden.bfloat16(), ids, weights)


def test_unknown_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="dispatch dtype is f16, expected one of bf16, f32, fp8"):
        make_rig("local", split_over(2), tmp_path, dispatch_dtype="f16")
    with pytest.raises(OptionError, match="combine dtype is fp8"):
        make_rig("local", split_over(2), tmp_path, combine_dtype="fp8")


def test_local_shards_cannot_be_replaced(tmp_path: Path) -> None:
    rig = make_rig("local", split_over(1), tmp_path)
    with pytest.raises(TransportError, match="shard 0"):
        rig.router._transport.replace(0, Endpoint(0, NODE, None, None, None))

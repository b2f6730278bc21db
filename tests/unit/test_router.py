"""The router against the reference, over every transport."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shards import (
    KEY,
    NODE,
    even_shard,
    expected,
    make_experts,
    make_shard,
    make_spec,
    random_routing,
    relative_error,
)

from ep.errors import PlacementError
from ep.placement import Placement, even_split
from ep.router import Router
from ep.transport.base import Transport
from ep.transport.handshake import Greeting
from ep.transport.local import LocalTransport
from ep.transport.sockets import SocketTransport

WAYS = ("local", "shm", "tcp")
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


@pytest.fixture(params=[(way, num_shards) for way in WAYS for num_shards in (1, 2, 4)], ids=lambda p: f"{p[0]}-{p[1]}")
def way(request: pytest.FixtureRequest) -> tuple[str, int]:
    return request.param


def make_transport(way: str, num_shards: int, dtype: torch.dtype, folder: Path) -> tuple[Transport, list]:
    shards = [even_shard(idx, num_shards, dtype) for idx in range(num_shards)]
    spec = shards[0].spec
    if way == "local":
        return LocalTransport(shards, spec.hidden_size, spec.top_k, max_tokens=64), shards
    folder.mkdir(mode=0o700, exist_ok=True)
    endpoints = [shard.listen(KEY, NODE, host="127.0.0.1", unix_dir=folder) for shard in shards]
    node = NODE if way == "shm" else "node-b"
    return SocketTransport(endpoints, Greeting.of(spec, "router-0", 64), KEY, node), shards


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def router(request: pytest.FixtureRequest, way: tuple[str, int], tmp_path: Path) -> Iterator[Router]:
    transport, shards = make_transport(*way, request.param, tmp_path / "s")
    spec = shards[0].spec
    placement = even_split(spec.num_moe_layers, spec.num_experts, way[1])
    router = Router(spec, placement, transport, dispatch_dtype="f32" if request.param == torch.float32 else "bf16")
    router.experts = make_experts(spec, request.param)  # type: ignore[attr-defined]
    yield router
    router.close()
    for shard in shards:
        shard.close()


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 17, 64, 150])
def test_equals_reference(router: Router, num_tokens: int) -> None:
    dtype = torch.float32 if router.dispatch_dtype == "f32" else torch.bfloat16
    for layer_pos in range(2):
        hidden, ids, weights = random_routing(router.spec, num_tokens, seed=num_tokens)
        hidden = hidden.to(dtype)
        out = router.moe(layer_pos, hidden, ids, weights)
        assert out.shape == hidden.shape and out.dtype == dtype
        wanted = expected(router.experts[layer_pos], hidden, ids, weights)  # type: ignore[attr-defined]
        assert relative_error(out, wanted) <= BOUND[dtype]

"""Routers that share every batch compute together what one router computes, and fail without leaving each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ep.errors import ShardFailedError, TransportError
from ep.group_router import GroupRouter
from ep.placement import even_split
from ep.router import Router
from ep.share import Share
from ep.transport.handshake import Greeting
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

NUM_SHARDS = 2


@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_padded_and_put_together_begin_with_the_batch(num_rows: int, size: int) -> None:
    batch = list(range(num_rows))
    gathered: list[int] = []
    for rank in range(size):
        share = Share(rank, size)
        part = batch[share.rows(num_rows)]
        padding = share.length(num_rows) - len(part)
        assert padding >= 0
        gathered += part + [-1] * padding
    assert gathered[:num_rows] == batch and set(gathered[num_rows:]) <= {-1}
    assert len(gathered) < num_rows + size


class Group:
    """Two shards, `size` routers that share every batch, and one that has all of it."""

    def __init__(self, size: int, folder: Path) -> None:
        self.spec = make_spec()
        self.placement = even_split(NUM_LAYERS, NUM_EXPERTS, NUM_SHARDS)
        self.experts = make_experts(self.spec, torch.bfloat16)
        self.shards = [make_shard(self.spec, self.placement, idx, self.experts) for idx in range(NUM_SHARDS)]
        self.endpoints = [shard.listen(KEY, NODE, unix_dir=folder) for shard in self.shards]
        self.routers = [self._router(f"router-{rank}") for rank in range(size)]
        self.ranks = [GroupRouter(router, Share(rank, size)) for rank, router in enumerate(self.routers)]
        self.alone = self._router("alone")

    def _router(self, name: str) -> Router:
        transport = SocketTransport(self.endpoints, Greeting.of(self.spec, name, 64), KEY, NODE)
        return Router(self.spec, self.placement, transport)

    def moe(self, layer_pos: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As the ranks of vLLM do it: all dispatch, all combine, what they have is put together."""
        for rank in self.ranks:
            rank.dispatch(layer_pos, hidden, ids, weights)
        return torch.cat([rank.combine(layer_pos) for rank in self.ranks])[: len(hidden)]

    def close(self) -> None:
        for router in (*self.routers, self.alone):
            router.close()
        for shard in self.shards:
            shard.close()


@pytest.fixture(params=[2, 3])
def group(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Group]:
    group = Group(request.param, tmp_path / "s")
    yield group
    group.close()


def test_the_routers_together_compute_what_one_does(group: Group) -> None:
    for num_tokens in (0, 1, 2, 3, 16, 17):
        for layer_pos, experts in enumerate(group.experts):
            hidden, ids, weights = random_routing(group.spec, num_tokens, seed=num_tokens)
            hidden = hidden.bfloat16()
            together = group.moe(layer_pos, hidden, ids, weights)
            assert relative_error(together, expected(experts, hidden, ids, weights)) <= BF16_BOUND
            assert relative_error(together, group.alone.moe(layer_pos, hidden, ids, weights)) <= BF16_BOUND


def test_each_row_is_sent_by_one_of_them(group: Group) -> None:
    hidden, ids, weights = random_routing(group.spec, 1)
    group.moe(0, hidden.bfloat16(), ids, weights)
    sent = [sum(link.pairs for link in router.stats()) for router in group.routers]
    assert sent == [group.spec.top_k, *[0] * (len(sent) - 1)]
    hidden, ids, weights = random_routing(group.spec, 19)
    group.moe(0, hidden.bfloat16(), ids, weights)
    assert sum(link.pairs for router in group.routers for link in router.stats()) == 20 * group.spec.top_k
    assert all(any(link.pairs for link in router.stats()) for router in group.routers)


def test_a_failure_waits_for_the_end_of_the_step(group: Group) -> None:
    """The last rank's shards refuse its placement; all ranks go on through both layers, and only it raises."""
    hidden, ids, weights = random_routing(group.spec, 12)
    hidden = hidden.bfloat16()
    wanted = group.moe(0, hidden, ids, weights)
    broken, healthy = group.ranks[-1], group.ranks[:-1]
    group.routers[-1].set_placement(even_split(NUM_LAYERS, NUM_EXPERTS, NUM_SHARDS, generation=1))
    with pytest.raises(ShardFailedError, match="generation is 1"), broken.step(12, 12):
        found = group.moe(0, hidden, ids, weights)
        rows = broken.share.rows(12)
        assert torch.equal(found[: rows.start], wanted[: rows.start]) and not found[rows].any()
        asked = sum(shard.stats().requests for shard in group.shards)
        broken.dispatch(1, hidden, ids, weights)
        assert not broken.combine(1).any()
        assert sum(shard.stats().requests for shard in group.shards) == asked, "it asks nobody any more in this step"
    for rank in healthy:
        with rank.step(12, 12):
            pass
    group.routers[-1].set_placement(group.placement)
    with broken.step(12, 12):
        assert torch.equal(group.moe(0, hidden, ids, weights), wanted)


def test_outside_of_a_step_a_failure_is_raised_at_once(group: Group) -> None:
    hidden, ids, weights = random_routing(group.spec, 12)
    group.routers[0].set_placement(even_split(NUM_LAYERS, NUM_EXPERTS, NUM_SHARDS, generation=1))
    group.ranks[0].dispatch(0, hidden.bfloat16(), ids, weights)
    with pytest.raises(TransportError):
        group.ranks[0].combine(0)

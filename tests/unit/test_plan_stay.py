"""A plan near the placement in use: as good as one without it, fewer moves, experts in the slots that they have."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep.placement import EMPTY, Placement
from ep.planning.plan import plan
from ep.planning.request import PlanRequest
from ep.planning.solve import GOOD
from tests.unit.plan_cases import Float64Array, problems, zipf

NODES = tuple(np.repeat(np.arange(4), 8).tolist())
REQUESTS = [
    PlanRequest(32, 32),
    PlanRequest(24, 20),
    PlanRequest(32, 32, NODES, separate_domains=True),
    PlanRequest(32, 32, NODES, num_groups=8, topk_groups=4),
]


def moved(placement: Placement, previous: Placement) -> list[int]:
    """Experts that shards did not have, by layer."""
    result = []
    for new, old in zip(placement.slots.tolist(), previous.slots.tolist()):
        old += [[]] * (len(new) - len(old))
        result.append(sum(len(set(here) - set(before) - {EMPTY}) for here, before in zip(new, old)))
    return result


@pytest.mark.parametrize("request_", REQUESTS)
def test_the_same_loads_move_nothing(request_: PlanRequest) -> None:
    table = zipf(6, 256, 1.0, seed=4)
    first = plan(table, request_).placement
    again = plan(table, replace(request_, previous=first, generation=7))
    assert np.array_equal(again.placement.slots, first.slots) and not again.moves.any()
    assert again.placement.generation == 7


@pytest.mark.parametrize("request_", REQUESTS)
def test_renumbered_shards_move_nothing(request_: PlanRequest) -> None:
    """Shards of a node, and nodes as wholes, in another order with other slots: nothing has to travel."""
    table = zipf(4, 256, 1.0, seed=4)
    first = plan(table, request_).placement
    rng = np.random.default_rng(0)
    shards = rng.permutation(32).tolist() if request_.num_shards == 32 else rng.permutation(24).tolist()
    if request_.node_of_shard is not None:
        shards = [8 * node + shard for node in (2, 0, 3, 1) for shard in rng.permutation(8).tolist()]
    shuffled = Placement(0, 256, rng.permuted(first.slots[:, shards], axis=2))
    result = plan(table, replace(request_, previous=shuffled))
    assert not result.moves.any()
    assert np.array_equal(result.placement.slots, shuffled.slots)


@pytest.mark.parametrize("request_", REQUESTS)
def test_drifted_loads_move_fewer_experts_at_equal_quality(request_: PlanRequest) -> None:
    table = zipf(8, 256, 1.0, seed=4)
    previous = plan(table, request_).placement
    drifted = table * np.random.default_rng(1).uniform(0.8, 1.25, table.shape)
    fresh, near = plan(drifted, request_), plan(drifted, replace(request_, previous=previous))
    best = np.maximum(fresh.shard_load.max(axis=1), fresh.lower_bound * (1 + GOOD))
    assert (near.shard_load.max(axis=1) <= best * (1 + 1e-9)).all()
    assert near.moves.tolist() == moved(near.placement, previous)
    assert near.moves.sum() < 0.9 * sum(moved(fresh.placement, previous))
    slack = plan(drifted, replace(request_, previous=previous, slack=0.05))
    assert slack.moves.sum() <= near.moves.sum()
    assert (slack.shard_load.max(axis=1) <= best * (1.05 + 1e-9)).all()


@given(problems(), st.integers(0, 2**32))
@settings(max_examples=100)
def test_any_previous_placement(problem: tuple[Float64Array, PlanRequest], seed: int) -> None:
    """Of other loads and another number of shards: as good as without, and what stays keeps its slot."""
    table, request = problem
    rng = np.random.default_rng(seed)
    num_experts = table.shape[1]
    before = PlanRequest(int(rng.integers(1, num_experts + 1)))
    if rng.random() < 0.5:
        before = PlanRequest(request.num_shards, request.num_redundant)
    previous = plan(rng.random(table.shape), before).placement
    fresh, near = plan(table, request), plan(table, replace(request, previous=previous))
    best = np.maximum(fresh.shard_load.max(axis=1), fresh.lower_bound * (1 + GOOD))
    assert (near.shard_load.max(axis=1) <= best * (1 + 1e-9)).all()
    assert near.moves.tolist() == moved(near.placement, previous)
    assert near.moves.sum() <= sum(moved(fresh.placement, previous)) or request.separate_domains
    for new, old in zip(near.placement.slots.tolist(), previous.slots.tolist()):
        for here, there in zip(new, old):
            for slot, expert in enumerate(there[: len(here)]):
                assert expert == EMPTY or expert not in here or here[slot] == expert

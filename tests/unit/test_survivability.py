"""What a placement tolerates and what others would cost, beside the same counted out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings

from ep.errors import PlacementError
from ep.placement import EMPTY, Placement, even_split
from ep.planning.plan import plan
from ep.planning.request import PlanRequest
from ep.planning.survivability import survivability
from ep.planning.what_if import what_if
from tests.unit.plan_cases import Float64Array, problems, zipf


def survives(placement: Placement, lost: tuple[int, ...]) -> bool:
    left = [shard for shard in range(placement.num_shards) if shard not in lost]
    everything = set(range(placement.num_experts))
    return all(set(layer[left].ravel().tolist()) - {EMPTY} == everything for layer in placement.slots)


@given(problems())
@settings(max_examples=60)
def test_losses_are_those_counted_out(problem: tuple[Float64Array, PlanRequest]) -> None:
    table, request = problem
    placement = plan(table, request).placement
    nodes = request.node_of_shard or tuple(range(request.num_shards))
    found = survivability(placement, nodes, bytes_per_expert=10**9, max_lost=8)
    assert found.redundant_bytes == len(table) * request.num_redundant * 10**9
    assert found.nodes is not None
    for tolerance, units in ((found.shards, tuple(range(request.num_shards))), (found.nodes, nodes)):
        fatal = tolerance.num_units
        for losses in tolerance.losses:
            combinations = list(itertools.combinations(sorted(set(units)), losses.num_lost))
            good = [
                survives(placement, tuple(shard for shard, unit in enumerate(units) if unit in lost))
                for lost in combinations
            ]
            assert losses.exact and losses.survived == pytest.approx(sum(good) / len(good))
            if not all(good):
                fatal = min(fatal, losses.num_lost)
            if request.num_redundant:
                assert losses.per_gb == pytest.approx(losses.survived / (len(table) * request.num_redundant))
        assert tolerance.fatal == fatal


def test_a_sample_is_near_the_count_and_the_same_each_time() -> None:
    """Every expert twice, on shards that are neighbours: half of the losses of 2 neighbours hit one."""
    shards = 64
    slots = np.array([[[2 * (shard // 2), 2 * (shard // 2) + 1] for shard in range(shards)]])
    found = survivability(Placement(0, shards, slots), max_lost=4)
    assert found.shards.fatal == 2 and found.nodes is None
    assert [losses.exact for losses in found.shards.losses] == [True, True, False, False]
    expected = np.prod([(shards - 2 * k) / (shards - k) for k in range(4)])
    assert found.shards.losses[3].survived == pytest.approx(expected, abs=0.01)
    assert survivability(Placement(0, shards, slots), max_lost=4) == found


def test_without_redundancy_every_loss_is_fatal() -> None:
    found = survivability(even_split(2, 8, 4), bytes_per_expert=5)
    assert found.redundant_bytes == 0 and found.shards.fatal == 1
    assert [(losses.survived, losses.per_gb) for losses in found.shards.losses] == [(0.0, None)] * 3


def test_separate_domains_survive_a_node_where_others_do_not() -> None:
    nodes = (0, 0, 0, 0, 1, 1, 1, 1)
    table = zipf(3, 16, 0.5, seed=1)
    apart = plan(table, PlanRequest(8, 16 * 3, nodes, separate_domains=True)).placement
    counts = apart.lookup().num_replicas
    found = survivability(apart, nodes).nodes
    assert found is not None and found.fatal == (2 if counts.min() > 1 else 1)


def test_nodes_of_other_shards() -> None:
    with pytest.raises(PlacementError, match="node_of_shard names 2 shards, expected 4"):
        survivability(even_split(1, 8, 4), (0, 1))


def test_what_if_is_the_plan_of_each_pair() -> None:
    table = zipf(2, 64, 1.0, seed=2)
    rows = what_if(table, 10, shards=(4, 64, 72), redundants=(0, 8))
    assert [(row.num_shards, row.num_redundant) for row in rows] == [(4, 0), (4, 8), (64, 0), (64, 8), (72, 8)]
    for row in rows:
        result = plan(table, PlanRequest(row.num_shards, row.num_redundant))
        assert row.excess == result.imbalance.excess.mean() and row.evenness == result.imbalance.evenness.mean()
        assert row.slots_per_shard == -(-(64 + row.num_redundant) // row.num_shards)
    assert [row.extra_bytes_per_shard for row in rows] == [0, 2 * 2 * 10, 0, 2 * 10, 0]

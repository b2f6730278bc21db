"""Plans: every request that can be met is, bounds hold, and nothing depends on how experts are numbered."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep.errors import PlacementError
from ep.placement import EMPTY, Placement
from ep.planning.bound import lower_bound
from ep.planning.imbalance import imbalance
from ep.planning.packing import most_per_domain
from ep.planning.plan import plan, shard_load
from ep.planning.request import PlanRequest
from tests.unit.plan_cases import README_LOADS, Float64Array, carried, loads, problems, zipf


@given(problems())
@settings(max_examples=80)
def test_plans_are_what_was_asked_for(problem: tuple[Float64Array, PlanRequest]) -> None:
    table, request = problem
    result = plan(table, request)
    slots = result.placement.slots
    filled = (slots != EMPTY).sum(axis=2)
    assert (filled.sum(axis=1) == table.shape[1] + request.num_redundant).all()
    assert (filled.max(axis=1) - filled.min(axis=1) <= 1).all() and slots.shape[2] == filled.max()
    assert result.placement.generation == request.generation
    expected = carried(result.placement, table)
    np.testing.assert_allclose(result.shard_load, expected, rtol=1e-12)
    assert (result.lower_bound <= result.shard_load.max(axis=1)).all()
    assert (result.split_at_will <= result.shard_load.max(axis=1) * (1 + 1e-7) + 1e-9).all()
    assert (result.split_at_will * (1 + 1e-7) + 1e-9 >= table.sum(axis=1) / request.num_shards).all()
    assert not result.moves.any()
    assert plan(table, request).placement == result.placement


@given(loads(4), st.integers(1, 3), st.integers(0, 2))
@settings(max_examples=40)
def test_the_bound_is_below_every_placement_there_is(table: Float64Array, num_shards: int, num_redundant: int) -> None:
    """Compared with the best of all placements, counted out."""
    num_experts = table.shape[1]
    num_slots = num_experts + num_redundant
    if num_slots < num_shards or num_redundant > (num_shards - 1) * num_experts:
        return
    sizes = {num_slots // num_shards, -(-num_slots // num_shards)}
    subsets = [set(c) for size in sizes for c in itertools.combinations(range(num_experts), size)]
    best = np.full(len(table), np.inf)
    for shards in itertools.combinations_with_replacement(subsets, num_shards):
        counts = np.array([sum(expert in shard for shard in shards) for expert in range(num_experts)])
        if counts.sum() != num_slots or counts.min() == 0:
            continue
        carried_here = np.stack([(table / counts)[:, sorted(shard)].sum(axis=1) for shard in shards])
        best = np.minimum(best, carried_here.max(axis=0))
    result = plan(table, PlanRequest(num_shards, num_redundant))
    assert np.isfinite(best).all()
    assert (lower_bound(table, num_shards, num_redundant) <= best * (1 + 1e-7)).all()
    assert (result.lower_bound <= best * (1 + 1e-7)).all()
    assert (result.shard_load.max(axis=1) >= best * (1 - 1e-12)).all()


@given(st.integers(0, 2**32), st.sampled_from([(8, 8), (12, 20), (24, 0), (32, 32)]))
@settings(max_examples=20)
def test_the_numbering_of_experts_does_not_matter(seed: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    table = rng.permuted(np.arange(1.0, 129)[None] ** -1.1 + rng.random((3, 128)) * 1e-3, axis=1)
    order = rng.permutation(128)
    one, other = (plan(t, PlanRequest(*size)) for t in (table, table[:, order]))
    np.testing.assert_allclose(one.shard_load.max(axis=1), other.shard_load.max(axis=1), rtol=1e-9)


@pytest.mark.parametrize("exponent", [0.5, 0.75, 1.0, 1.25, 1.5])
def test_32_shards_with_32_redundant_slots_are_within_2_percent_of_the_bound(exponent: float) -> None:
    result = plan(zipf(58, 256, exponent, seed=1), PlanRequest(32, 32))
    assert result.gap.max() < 0.02


def test_equal_loads_are_level() -> None:
    assert plan(np.full((2, 64), 7), PlanRequest(8)).imbalance.excess.tolist() == [0, 0]
    assert plan(np.full((2, 64), 7), PlanRequest(8, 64)).gap.tolist() == [0, 0]


def test_layers_without_load_are_spread_too() -> None:
    result = plan(np.zeros((2, 9)), PlanRequest(3, 9))
    assert (result.placement.lookup().num_replicas == 2).all()
    assert result.imbalance.evenness.tolist() == [1, 1] and result.gap.tolist() == [0, 0]


def test_every_expert_on_every_shard() -> None:
    result = plan(README_LOADS, PlanRequest(4, 36))
    assert (result.placement.lookup().num_replicas == 4).all()
    np.testing.assert_allclose(result.imbalance.excess, 0, atol=1e-12)


@pytest.mark.parametrize("limit", [1, 2])
def test_groups_stay_on_their_nodes(limit: int) -> None:
    """8 groups on 4 nodes, once with slots that the nodes do not divide."""
    table = zipf(5, 64, 1.2, seed=3)
    request = PlanRequest(8, 16 + limit, (0, 1, 2, 3) * 2, num_groups=8, topk_groups=limit)
    placement = plan(table, request).placement
    assert request.hierarchical
    for layer in placement.slots:
        where: dict[int, set[int]] = {}
        for shard, experts in enumerate(layer.tolist()):
            for expert in experts:
                if expert != EMPTY:
                    where.setdefault(expert // 8, set()).add(shard % 4)
        assert all(len(nodes) == 1 for nodes in where.values())
        filled = (layer != EMPTY).sum(axis=1)
        assert filled.max() - filled.min() <= 1 and filled.sum() == 64 + 16 + limit


@pytest.mark.parametrize("nodes", [(0, 0, 0, 0, 1, 1, 1, 1), (0, 1, 2, 0, 1, 2, 0, 1, 2), (5, 5, 9, 9, 7, 7)])
@pytest.mark.parametrize("num_redundant", [7, 40, 64])
def test_replicas_lie_in_different_domains(nodes: tuple[int, ...], num_redundant: int) -> None:
    request = PlanRequest(len(nodes), num_redundant, nodes, separate_domains=True)
    result = plan(zipf(4, 32, 1.0, seed=2), request)
    lookup = result.placement.lookup()
    most = most_per_domain(request.nodes)[lookup.num_replicas]
    for domain in set(nodes):
        here = np.isin(lookup.shard_idx, np.flatnonzero(np.array(nodes) == domain)).sum(axis=2)
        assert (here <= most).all()
    together = plan(zipf(4, 32, 1.0, seed=2), PlanRequest(len(nodes), num_redundant, nodes))
    assert (result.shard_load.max(axis=1) >= together.lower_bound).all()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_domains_of_any_size_share_replicas_evenly(nodes: list[int]) -> None:
    domains = np.unique(nodes, return_inverse=True)[1]
    for replicas, most in enumerate(most_per_domain(domains).tolist()):
        room = [min(most, int((domains == d).sum())) for d in set(domains.tolist())]
        tighter = [min(most - 1, int((domains == d).sum())) for d in set(domains.tolist())]
        assert sum(room) >= replicas and (most == 0 or sum(tighter) < replicas)


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda: PlanRequest(0), "num_shards is 0, expected at least 1"),
        (lambda: PlanRequest(4, -1), "num_redundant is -1"),
        (lambda: PlanRequest(4, 37), "num_redundant is 37, expected at most 36: 12 experts"),
        (lambda: PlanRequest(1, 1), "num_redundant is 1, expected at most 0"),
        (lambda: PlanRequest(14, 1), "num_shards is 14, expected at most 13: 12 experts and 1 redundant"),
        (lambda: PlanRequest(4, 0, (0, 1)), "node_of_shard names 2 shards, expected 4"),
        (lambda: PlanRequest(4, 0, separate_domains=True), "expected node_of_shard"),
        (lambda: PlanRequest(4, 0, None, 4, 8), "topk_groups is 8, expected at most 4"),
        (lambda: PlanRequest(4, 0, (0, 0, 1, 1), 8, 4), "num_groups is 8, expected a divisor of 12"),
        (lambda: PlanRequest(4, 13, (0, 0, 1, 1), 4, 2), "num_redundant is 13, expected at most 12: .* of its node"),
        (lambda: PlanRequest(4, 4, (0, 0, 1, 1), 4, 2, separate_domains=True), "no group limit with it"),
        (lambda: PlanRequest(4, slack=-0.1), "slack is -0.1"),
        (
            lambda: PlanRequest(4, previous=Placement(0, 2, np.array([[[0, 1]]]))),
            "previous placement has 1 MoE layers of 2 experts, expected 2 of 12",
        ),
    ],
)
def test_requests_that_nothing_satisfies(request_of: object, message: str) -> None:
    assert callable(request_of)
    with pytest.raises(PlacementError, match=message):
        plan(README_LOADS, request_of())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([1, 2], r"shape \(2,\)"),
        (np.zeros((0, 4)), "shape"),
        ([[1, -2]], "expert 1 of MoE layer 0 has -2"),
        ([[1, 2], [float("nan"), 2]], "expert 0 of MoE layer 1 has nan"),
    ],
)
def test_no_loads(table: object, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        plan(table, PlanRequest(1))  # type: ignore[arg-type]


def test_loads_of_another_model() -> None:
    placement = plan(README_LOADS, PlanRequest(4)).placement
    with pytest.raises(PlacementError, match=r"shape \(1, 3\), expected \(2, 12\)"):
        shard_load(placement, [[1, 2, 3]])


def test_published_measures() -> None:
    measures = imbalance([[2, 2, 2, 2], [4, 2, 1, 1], [0, 0, 0, 0]])
    assert measures.excess.tolist() == [0, 1, 0]
    assert measures.evenness.tolist() == [1, 0.5, 1]

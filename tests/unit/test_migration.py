"""Steps from one placement to another, replayed on simulated shards."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep.errors import PlacementError
from ep.migration import DISK, Step, Transfer, payback, plan_steps, union
from ep.placement import EMPTY, Placement, even_split, with_spares
from ep.planning.plan import plan, shard_load
from ep.planning.request import PlanRequest


def random_placement(rng: np.random.Generator, layers: int, experts: int, shards: int, per_shard: int) -> Placement:
    """Every expert once, then replicas and gaps at random; slots in random order."""
    slots = np.full((layers, shards, per_shard), EMPTY, dtype=np.int32)
    for layer in range(layers):
        held: list[set[int]] = [set() for _ in range(shards)]
        for expert in rng.permutation(experts).tolist():
            open_shards = [shard for shard in range(shards) if len(held[shard]) < per_shard]
            held[int(rng.choice(open_shards))].add(expert)
        for shard in range(shards):
            for expert in rng.permutation(experts).tolist():
                if len(held[shard]) < per_shard and rng.random() < 0.1:
                    held[shard].add(expert)
            order = rng.permutation(per_shard)[: len(held[shard])]
            slots[layer, shard, order] = list(held[shard])
    return Placement(int(rng.integers(5)), experts, slots)


@st.composite
def pairs(draw: st.DrawFn, spares: int = 1) -> tuple[Placement, Placement]:
    """A running placement with at least `spares` slots per shard more than the target has."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shards, experts = draw(st.integers(1, 5)), draw(st.integers(5, 14))
    per_shard = -(-experts // shards) + draw(st.integers(0, 3))
    layers = draw(st.integers(1, 3))
    target = random_placement(rng, layers, experts, shards, min(per_shard, experts))
    current = random_placement(rng, layers, experts, shards, min(per_shard, experts))
    return with_spares(current, per_shard - current.slots_per_shard + spares), target


def held(placement: Placement) -> list[list[set[int]]]:
    return [[set(shard[shard != EMPTY].tolist()) for shard in layer] for layer in placement.slots]


@given(pair=pairs(), data=st.data())
@settings(max_examples=150)
def test_every_step_keeps_both_placements_whole(pair: tuple[Placement, Placement], data: st.DataObject) -> None:
    current, target = pair
    memory = current.slots.copy()
    before = current
    steps = plan_steps(current, target)
    for step in steps:
        assert step.placement.generation == before.generation + 1
        cut = data.draw(st.integers(0, len(step.transfers)))
        for idx, transfer in enumerate(step.transfers):
            if idx == cut:  # killed here: what is served is untouched
                assert (memory[before.slots != EMPTY] == before.slots[before.slots != EMPTY]).all()
            assert before.slots[transfer.layer_pos, transfer.to_shard, transfer.to_slot] == EMPTY
            assert before.slots[transfer.layer_pos, transfer.from_shard, transfer.from_slot] == transfer.expert_idx
            memory[transfer.layer_pos, transfer.to_shard, transfer.to_slot] = transfer.expert_idx
        both = union(before, step.placement)
        assert (memory[both != EMPTY] == both[both != EMPTY]).all()
        before = step.placement
    assert held(before) == held(target)
    missing = sum(
        len(new - old)
        for new_layer, old_layer in zip(held(target), held(current), strict=True)
        for new, old in zip(new_layer, old_layer, strict=True)
    )
    assert sum(len(step.transfers) for step in steps) == missing


@given(pair=pairs(spares=6))
def test_room_for_all_takes_one_step(pair: tuple[Placement, Placement]) -> None:
    current, target = pair
    arrivals = [
        len(new - old)
        for new_layer, old_layer in zip(held(target), held(current), strict=True)
        for new, old in zip(new_layer, old_layer, strict=True)
    ]
    if max(arrivals) <= 6:
        assert len(plan_steps(current, target)) <= 1


@given(pair=pairs(spares=0))
def test_without_spares_it_arrives_or_says_so(pair: tuple[Placement, Placement]) -> None:
    current, target = pair
    try:
        steps = plan_steps(current, target)
    except PlacementError as error:
        assert "spare slot" in str(error)
    else:
        assert held(steps[-1].placement if steps else current) == held(target)


def test_a_swap_needs_a_spare() -> None:
    here = Placement(0, 2, np.array([[[0], [1]]]))
    there = Placement(0, 2, np.array([[[1], [0]]]))
    with pytest.raises(PlacementError, match="one spare slot on every shard"):
        plan_steps(here, there)
    (step,) = plan_steps(with_spares(here, 1), there)
    assert step.transfers == (Transfer(0, 1, 0, 1, 1, 0), Transfer(0, 0, 1, 1, 0, 0))


def test_sources_are_near_then_level_then_disk() -> None:
    current = with_spares(Placement(0, 2, np.array([[[0, 1], [0, 1], [0, EMPTY], [1, EMPTY]]])), 2)
    target = Placement(0, 2, np.array([[[0, 1], [0, 1], [0, 1], [0, 1]]]))
    (step,) = plan_steps(current, target, ["a", "b", "a", "b"])
    assert [(t.to_shard, t.from_shard) for t in step.transfers] == [(2, 0), (3, 1)]
    (step,) = plan_steps(current, target)
    assert len({t.from_shard for t in step.transfers}) == 2
    (step,) = plan_steps(current, target, lost={0, 1, 3})
    assert [(t.to_shard, t.from_shard) for t in step.transfers] == [(2, DISK), (3, 2)]


def test_other_sizes_are_refused() -> None:
    with pytest.raises(PlacementError, match="change from"):
        plan_steps(even_split(1, 8, 2), even_split(1, 8, 4))
    with pytest.raises(PlacementError, match="4 slots needed"):
        plan_steps(even_split(1, 6, 2), Placement(0, 6, np.array([[[0, 1, 2, 3], [4, 5, EMPTY, EMPTY]]])))


def test_placements_that_clash_have_no_union() -> None:
    with pytest.raises(PlacementError, match="one expert here, another there"):
        union(Placement(0, 2, np.array([[[0], [1]]])), Placement(1, 2, np.array([[[1], [0]]])))


def test_a_plan_for_skewed_load_is_reached_and_pays() -> None:
    loads = 1000.0 / (1 + np.random.default_rng(0).permuted(np.tile(np.arange(64), (6, 1)), axis=1))
    current = with_spares(even_split(6, 64, 4), 1)
    planned = plan(loads, PlanRequest(4, generation=1, previous=current))
    steps: tuple[Step, ...] = plan_steps(current, planned.placement)
    assert held(steps[-1].placement) == held(planned.placement)
    found = payback(loads, current, planned.placement, 1e-6, 10.0, 10_000_000, 1e9, 300.0)
    saved = shard_load(current, loads).max(axis=1).sum() - shard_load(planned.placement, loads).max(axis=1).sum()
    assert found.gain == pytest.approx(saved * 1e-7) and found.cost_s == pytest.approx(0.01)
    assert found.worthwhile == (found.pays_back_after_s <= 300.0) and "pays back after" in found.describe()


def test_nothing_gained_never_pays_back() -> None:
    placement = even_split(1, 8, 2)
    found = payback(np.ones((1, 8)), placement, placement, 1e-6, 1.0, 1, 1.0, 1e9)
    assert math.isinf(found.pays_back_after_s) and not found.worthwhile and "never" in found.describe()

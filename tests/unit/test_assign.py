from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep.assign import POLICIES, Assigner, split
from ep.errors import OptionError
from ep.placement import EMPTY, Placement, even_split
from ep.planning.plan import plan
from ep.planning.request import PlanRequest
from ep.planning.waterfill import busiest_when_split_at_will


@st.composite
def routings(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Shards int32 [T, K] and how many there are."""
    num_shards = draw(st.integers(1, 6))
    shape = draw(st.integers(0, 12)), draw(st.integers(1, 8))
    values = draw(st.lists(st.integers(0, num_shards - 1), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return np.array(values, dtype=np.int32).reshape(shape), num_shards


@given(routings())
def test_every_pair_goes_to_its_shard_in_token_order(routing: tuple[np.ndarray, int]) -> None:
    shards, num_shards = routing
    works = split(shards, num_shards)
    assert len(works) == num_shards
    for shard, work in enumerate(works):
        chosen = [np.flatnonzero(row == shard) for row in shards]
        assert work.token_idx.tolist() == [token for token, choices in enumerate(chosen) if len(choices)]
        assert work.counts.tolist() == [len(choices) for choices in chosen if len(choices)]
        assert work.pair_idx.tolist() == [
            token * shards.shape[1] + choice for token, choices in enumerate(chosen) for choice in choices
        ]


@given(st.integers(1, 8), st.integers(1, 20), st.integers(0, 2**32))
def test_slots_hold_the_experts_that_were_asked_for(num_shards: int, num_tokens: int, seed: int) -> None:
    placement = even_split(2, 8, num_shards)
    ids = np.random.default_rng(seed).integers(0, 8, (num_tokens, 3)).astype(np.int32)
    for layer_pos in range(2):
        shards, slots = Assigner(placement).place(layer_pos, ids)
        assert np.array_equal(placement.slots[layer_pos, shards, slots], ids)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Placement, np.ndarray]:
    """A placement with replicas and a batch of different experts for each token, popular ones more often."""
    num_experts, num_shards = draw(st.integers(1, 24)), draw(st.integers(1, 9))
    least = max(num_shards - num_experts, 0)
    num_redundant = draw(st.integers(least, (num_shards - 1) * num_experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    loads = rng.random((2, num_experts)) ** draw(st.integers(0, 6))
    num_tokens, top_k = draw(st.integers(0, 40)), draw(st.integers(1, min(8, num_experts)))
    keys = rng.gumbel(size=(num_tokens, num_experts)) + np.log(loads[1] + 1e-9)
    ids = np.argsort(-keys, axis=1)[:, :top_k].astype(np.int32)
    return plan(loads, PlanRequest(num_shards, num_redundant)).placement, ids


def pairs_of_shards(placement: Placement, ids: np.ndarray, policy: str) -> np.ndarray:
    """Pairs of each shard, every one of them checked to lie where its expert is."""
    shards, slots = Assigner(placement, policy).place(1, ids)
    assert shards.shape == slots.shape == ids.shape and shards.dtype == slots.dtype == np.int32
    assert np.array_equal(placement.slots[1, shards, slots], ids)
    return np.bincount(shards.ravel(), minlength=placement.num_shards)


@given(batches())
@settings(max_examples=150)
def test_waterfill_is_never_worse_than_round_robin(batch: tuple[Placement, np.ndarray]) -> None:
    placement, ids = batch
    filled, turned, drawn = (pairs_of_shards(placement, ids, policy) for policy in POLICIES)
    assert filled.max() <= turned.max()
    assert filled.sum() == turned.sum() == drawn.sum() == ids.size


@given(batches())
def test_waterfill_is_near_the_best_split(batch: tuple[Placement, np.ndarray]) -> None:
    """Beside the linear program over all fractional splits, rounded up: within one pair per eight, and one more."""
    placement, ids = batch
    counts = np.zeros((2, placement.num_experts))
    counts[1] = np.bincount(ids.ravel(), minlength=placement.num_experts)
    best = np.ceil(busiest_when_split_at_will(placement, counts)[1] - 1e-6)
    assert pairs_of_shards(placement, ids, "waterfill").max() <= best * 1.125 + 1


@given(batches())
def test_the_same_batch_goes_the_same_way(batch: tuple[Placement, np.ndarray]) -> None:
    placement, ids = batch
    assigner = Assigner(placement)
    once = assigner.place(1, ids)
    assigner.place(0, ids)
    again = assigner.place(1, ids.astype(np.int64))
    assert all(np.array_equal(one, other) for one, other in zip(once, again))


def test_round_robin_takes_turns() -> None:
    slots = np.array([[[0, 1], [0, 2], [0, 3]]], dtype=np.int32)
    shards, _ = Assigner(Placement(0, 4, slots), "round_robin").place(0, np.zeros((7, 1), dtype=np.int32))
    assert shards.ravel().tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_random_depends_on_its_seed_alone() -> None:
    placement = Placement(0, 2, np.array([[[0, 1], [0, 1], [0, 1]]]))
    ids = np.zeros((300, 1), dtype=np.int32)
    one, same, other = (Assigner(placement, "random", seed).place(0, ids)[0] for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert np.bincount(one.ravel()).min() > 60


def test_waterfill_pours_around_what_lies_there() -> None:
    """Two experts with one replica load the first shard; the third's pairs fill the others up to it."""
    placement = Placement(0, 3, np.array([[[0, 1, 2], [2, EMPTY, EMPTY], [2, EMPTY, EMPTY]]]))
    ids = np.array([[0, 1], [0, 1], [2, 0], [2, 0], [2, 0], [2, 1], [2, 1], [2, 1]])
    assert np.array_equal(np.bincount(Assigner(placement).place(0, ids)[0].ravel()), [10, 3, 3])


def test_unknown_policy() -> None:
    with pytest.raises(OptionError, match="policy is least, expected one of waterfill, round_robin, random"):
        Assigner(even_split(1, 4, 2), "least")


def test_replicas_share_the_tokens_of_their_expert() -> None:
    slots = np.array([[[0, 1], [0, 2], [0, 3]]], dtype=np.int32)
    placement = Placement(0, 4, slots)
    ids = np.zeros((9, 1), dtype=np.int32)
    shards, found = Assigner(placement).place(0, ids)
    assert np.array_equal(placement.slots[0, shards, found], ids)
    assert np.bincount(shards.ravel()).tolist() == [3, 3, 3]

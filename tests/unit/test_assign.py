from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ep.assign import Assigner, split
from ep.placement import Placement, even_split


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


def test_replicas_share_the_tokens_of_their_expert() -> None:
    slots = np.array([[[0, 1], [0, 2], [0, 3]]], dtype=np.int32)
    placement = Placement(0, 4, slots)
    ids = np.zeros((9, 1), dtype=np.int32)
    shards, found = Assigner(placement).place(0, ids)
    assert np.array_equal(placement.slots[0, shards, found], ids)
    assert np.bincount(shards.ravel()).tolist() == [3, 3, 3]

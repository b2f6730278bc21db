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
def test_every_pair_goes_to_its_shard_in_jagged_order(routing: tuple[np.ndarray, int]) -> None:
    shards, num_shards = routing
    num_tokens, num_choices = shards.shape
    works = split(shards, num_shards)
    assert sorted(np.concatenate([work.pair_idx for work in works])) == list(range(shards.size))
    for shard, work in enumerate(works):
        expected = [[k for k in range(num_choices) if shards[t, k] == shard] for t in range(num_tokens)]
        tokens = work.token_idx.tolist()
        assert sorted(tokens) == [t for t in range(num_tokens) if expected[t]]
        assert [len(expected[t]) for t in tokens] == sorted((len(expected[t]) for t in tokens), reverse=True)
        assert [int(row) for row in work.row_of_token[work.token_idx]] == list(range(len(tokens)))
        assert sorted(work.row_of_token) == list(range(num_tokens))
        # Column c holds the c-th choice of the first column_sizes[c] tokens.
        wanted = [
            t * num_choices + expected[t][column]
            for column, size in enumerate(work.column_sizes)
            for t in tokens[:size]
        ]
        assert work.pair_idx.tolist() == wanted
        assert list(work.column_sizes) == sorted(work.column_sizes, reverse=True)


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

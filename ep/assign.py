"""Which shard gets which tokens of one layer, and in what order. Pure numpy.

Shape legend: T tokens, K top-k, S shards, P pairs on one shard, C its columns (ep/wire.py has the jagged order).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ep.placement import Placement

IntArray = npt.NDArray[np.integer]


@dataclass(frozen=True)
class ShardWork:
    """One shard's part of a layer.

    token_idx: int64 [tokens of this shard], rows of the hidden states, most slots first.
    row_of_token: int64 [T], where a token lies in token_idx; tokens without work here come after all that have some.
    column_sizes: the jagged columns. pair_idx: int64 [P] into the flattened [T, K] choices, in jagged order.
    """

    token_idx: npt.NDArray[np.int64]
    row_of_token: npt.NDArray[np.int64]
    column_sizes: tuple[int, ...]
    pair_idx: npt.NDArray[np.int64]


class Assigner:
    """Turns logical experts into slots for one placement generation.

    An expert with several replicas sends token t to replica t modulo their number, which levels them within a batch.
    """

    def __init__(self, placement: Placement) -> None:
        lookup = placement.lookup()
        self.num_shards = placement.num_shards
        self._shard_of = np.ascontiguousarray(lookup.shard_idx)
        self._slot_of = np.ascontiguousarray(lookup.slot_idx)
        self._num_replicas = lookup.num_replicas if lookup.shard_idx.shape[2] > 1 else None

    def place(self, layer_pos: int, topk_ids: IntArray) -> tuple[IntArray, IntArray]:
        """Logical experts [T, K] -> shards and slots, both int32 [T, K]. layer_pos counts MoE layers."""
        if self._num_replicas is None:
            return self._shard_of[layer_pos, :, 0].take(topk_ids), self._slot_of[layer_pos, :, 0].take(topk_ids)
        replica = np.arange(len(topk_ids))[:, None] % self._num_replicas[layer_pos].take(topk_ids)
        return self._shard_of[layer_pos][topk_ids, replica], self._slot_of[layer_pos][topk_ids, replica]


def split(shard_idx: IntArray, num_shards: int) -> list[ShardWork]:
    """Shards [T, K] of the chosen slots -> the work of each shard.

    Every pair lies in exactly one shard's work, every token at most once in each; a token's slots keep their order.
    """
    num_tokens, num_choices = shard_idx.shape
    cell = (shard_idx * num_tokens + np.arange(num_tokens)[:, None]).ravel()  # (shard, token) of each pair
    counts = np.bincount(cell, minlength=num_shards * num_tokens)
    by_cell = cell.argsort(kind="stable")
    cell = cell[by_cell]
    rank = np.arange(len(cell)) - (counts.cumsum() - counts)[cell]
    order = (-counts).reshape(num_shards, num_tokens).argsort(axis=1, kind="stable")
    row_of_token = order.argsort(axis=1)  # the inverse permutation
    column = cell // num_tokens * num_choices + rank
    sizes = np.bincount(column, minlength=num_shards * num_choices)
    ends = sizes.cumsum()
    pairs = np.empty(len(cell), dtype=np.int64)
    pairs[(ends - sizes)[column] + row_of_token.ravel()[cell]] = by_cell
    works = []
    start = 0
    for shard, columns in enumerate(sizes.reshape(num_shards, num_choices).tolist()):
        end = start + sum(columns)
        works.append(
            ShardWork(
                token_idx=order[shard, : columns[0]],
                row_of_token=row_of_token[shard],
                column_sizes=tuple(filter(None, columns)),
                pair_idx=pairs[start:end],
            )
        )
        start = end
    return works

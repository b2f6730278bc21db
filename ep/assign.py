"""Which shard gets which tokens of one layer, and in what order. Pure numpy.

Shape legend: T tokens, K top-k, S shards, P pairs (token, slot) on one shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ep.placement import Placement

IntArray = npt.NDArray[np.integer]


@dataclass(frozen=True)
class ShardWork:
    """One shard's part of a layer, in token order.

    token_idx: int64, the tokens that have slots here. counts: int64, how many each has. pair_idx: int64 [P] into the
    flattened [T, K] choices.
    """

    token_idx: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
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
    num_tokens = len(shard_idx)
    cell = (shard_idx * num_tokens + np.arange(num_tokens)[:, None]).ravel()  # (shard, token) of each pair
    counts = np.bincount(cell, minlength=num_shards * num_tokens).reshape(num_shards, num_tokens)
    pair_idx = cell.argsort(kind="stable")
    works = []
    start = 0
    for here, num_pairs in zip(counts, counts.sum(axis=1).tolist(), strict=True):
        token_idx = here.nonzero()[0]
        works.append(ShardWork(token_idx, here[token_idx], pair_idx[start : start + num_pairs]))
        start += num_pairs
    return works

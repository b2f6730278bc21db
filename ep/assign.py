"""Which shard gets which tokens of one layer, and in what order. Pure numpy.

Shape legend: T tokens, K top-k, S shards, P pairs (token, slot) on one shard, R replicas of an expert at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ep.errors import OptionError
from ep.placement import Placement

IntArray = npt.NDArray[np.integer]
POLICIES = ("waterfill", "round_robin", "random")
MAX_PASSES = 4
"""Over the replicated experts of a batch."""


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

    policy: which replica of an expert takes a token, where it has several.
    waterfill: those that level the shards' numbers of pairs in this batch. The same batch gives the same answer. No
        shard gets more pairs than the busiest one does by round robin.
    round_robin: token t goes to replica t modulo their number.
    random: drawn by `seed`, in the order of calls.
    Raises OptionError for another policy.
    """

    def __init__(self, placement: Placement, policy: str = "waterfill", seed: int = 0) -> None:
        if policy not in POLICIES:
            raise OptionError(f"assignment policy is {policy}, expected one of {', '.join(POLICIES)}")
        lookup = placement.lookup()
        self.num_shards = placement.num_shards
        self.policy = policy
        self._random = np.random.default_rng(seed)
        self._shard_of = np.ascontiguousarray(lookup.shard_idx)
        self._slot_of = np.ascontiguousarray(lookup.slot_idx)
        self._num_replicas = lookup.num_replicas if lookup.shard_idx.shape[2] > 1 else None
        self._shard_lists: list[list[list[int]] | None] = [None] * placement.num_moe_layers

    def place(self, layer_pos: int, topk_ids: IntArray) -> tuple[IntArray, IntArray]:
        """Logical experts [T, K] -> shards and slots, both int32 [T, K]. layer_pos counts MoE layers."""
        if self._num_replicas is None:
            return self._shard_of[layer_pos, :, 0].take(topk_ids), self._slot_of[layer_pos, :, 0].take(topk_ids)
        num_replicas = self._num_replicas[layer_pos].take(topk_ids)
        if self.policy == "random":
            replica = self._random.integers(0, num_replicas)
        else:
            replica = np.arange(len(topk_ids))[:, None] % num_replicas
            if self.policy == "waterfill":
                self._level(layer_pos, topk_ids, num_replicas, replica)
        # One flat index is several times as fast as two-dimensional indexing.
        index = topk_ids * self._shard_of.shape[2] + replica
        return self._shard_of[layer_pos].ravel().take(index), self._slot_of[layer_pos].ravel().take(index)

    def _level(self, layer_pos: int, topk_ids: IntArray, num_replicas: IntArray, replica: IntArray) -> None:
        """Changes `replica` [T, K], round robin's, so that shards level out.

        Expert after expert, its pairs are poured anew onto its replicas' shards, always the lowest first, beside what
        lies there of all others. That minimises the busiest of these shards, so the busiest of all never rises.
        """
        chosen = np.flatnonzero(num_replicas.ravel() > 1)
        if not len(chosen):
            return
        num_experts, width = self._shard_of.shape[1:]
        place = topk_ids.ravel() * width + replica.ravel()
        counts = np.bincount(place, minlength=num_experts * width).reshape(num_experts, width)
        shard_load = np.bincount(self._shard_of[layer_pos].ravel().take(place), minlength=self.num_shards).tolist()
        level = -(-topk_ids.size // self.num_shards)
        experts = topk_ids.ravel().take(chosen)
        present = np.flatnonzero(np.bincount(experts, minlength=num_experts))
        parts = counts.take(present, axis=0).tolist()
        shards = self._shards_by_expert(layer_pos)
        holders = [shards[expert] for expert in present.tolist()]
        before, peak = topk_ids.size + 1, max(shard_load)
        for pass_idx in range(MAX_PASSES):
            if peak <= level or peak == before:
                break
            for part, holder in zip(parts, holders):
                # Those after an expert change what it was poured beside; what matters is then the busiest shards.
                if pass_idx and not any(shard_load[shard] == peak for shard in holder):
                    continue
                if len(holder) == 2:
                    _pour_two(shard_load, holder, part)
                else:
                    _pour(shard_load, holder, part)
            before, peak = peak, max(shard_load)
        order = experts.astype(np.int16 if num_experts < 2**15 else np.int64).argsort(kind="stable")
        replica.ravel()[chosen[order]] = np.repeat(np.tile(np.arange(width), len(parts)), np.array(parts).ravel())

    def _shards_by_expert(self, layer_pos: int) -> list[list[int]]:
        """Shards of each expert's replicas as lists: a few numbers at a time are slow in numpy."""
        shards = self._shard_lists[layer_pos]
        if shards is None:
            assert self._num_replicas is not None
            pairs = zip(self._shard_of[layer_pos].tolist(), self._num_replicas[layer_pos].tolist(), strict=True)
            shards = self._shard_lists[layer_pos] = [row[:num] for row, num in pairs]
        return shards


def _pour(shard_load: list[int], holder: list[int], part: list[int]) -> None:
    """Takes one expert's pairs, `part` [R], off its replicas' shards and pours them again, the lowest shard first.

    Changes both lists; part is zero beyond the expert's replicas. Ties go to the earlier replica.
    """
    heights = sorted([(shard_load[shard] - count, replica) for replica, (shard, count) in enumerate(zip(holder, part))])
    total = sum(part)
    # The water stands over the num_wet lowest shards, up to `top`, and one higher over the first `more` of them.
    num_wet, volume = 0, total
    for height, _ in heights:
        if num_wet and height * num_wet >= volume:
            break
        volume += height
        num_wet += 1
    top, more = divmod(volume, num_wet)
    for rank, (height, replica) in enumerate(heights):
        stands = top + (rank < more) if rank < num_wet else height
        part[replica] = stands - height
        shard_load[holder[replica]] = stands


def _pour_two(shard_load: list[int], holder: list[int], part: list[int]) -> None:
    """`_pour` for an expert with two replicas, as most have."""
    first, second = holder
    total = part[0] + part[1]
    low, high = shard_load[first] - part[0], shard_load[second] - part[1]
    take = (total + high - low + 1) // 2
    if take < 0:
        take = 0
    elif take > total:
        take = total
    part[0], part[1] = take, total - take
    shard_load[first], shard_load[second] = low + take, high + total - take


def split(shard_idx: IntArray, num_shards: int) -> list[ShardWork]:
    """Shards [T, K] of the chosen slots, -1 for pairs of nobody here -> the work of each shard.

    Every other pair lies in exactly one shard's work, every token at most once in each; a token's slots keep their
    order.
    """
    num_tokens = len(shard_idx)
    cell = ((shard_idx + 1) * num_tokens + np.arange(num_tokens)[:, None]).ravel()  # (shard, token) of each pair
    counts = np.bincount(cell, minlength=(num_shards + 1) * num_tokens).reshape(num_shards + 1, num_tokens)[1:]
    pair_idx = cell.argsort(kind="stable")
    works = []
    start = shard_idx.size - int(counts.sum())
    for here, num_pairs in zip(counts, counts.sum(axis=1).tolist(), strict=True):
        token_idx = here.nonzero()[0]
        works.append(ShardWork(token_idx, here[token_idx], pair_idx[start : start + num_pairs]))
        start += num_pairs
    return works

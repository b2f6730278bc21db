"""Keeping experts where they are: of plans as good as each other, the one that moves least.

Shape legend: L MoE layers, S shards, P slots per shard, E logical experts, D nodes. Slots here are int64 with E where
empty, as in a packing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from ep.planning.levelling import level
from ep.planning.packing import Packing, from_slots

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

ROUNDS = 256


def holders(slots: Int64Array, num_experts: int, num_shards: int) -> BoolArray:
    """bool [L, num_shards, E]: which shard has which expert. Shards beyond those of slots [L, S, P] have none."""
    held = np.zeros((len(slots), num_shards, num_experts + 1), dtype=bool)
    layer, shard = np.ogrid[: len(slots), : min(slots.shape[1], num_shards)]
    held[layer[:, :, None], shard[:, :, None], slots[:, :num_shards]] = True
    return held[:, :, :num_experts]


def num_moves(slots: Int64Array, previous: Int64Array, num_experts: int) -> Int64Array:
    """int64 [L]: experts that a shard has to get because it does not have them."""
    num_shards = slots.shape[1]
    return (holders(slots, num_experts, num_shards) & ~holders(previous, num_experts, num_shards)).sum(axis=(1, 2))


def relabel(slots: Int64Array, previous: Int64Array, num_experts: int, nodes: Int64Array) -> Int64Array:
    """The same packing with its shards renumbered so that the fewest experts move.

    Shards change places within nodes of equally many, and such nodes as wholes: who shares a node stays the same. With
    one node the optimum (an assignment problem); with several, nodes are matched by the experts they have in common.
    """
    num_shards = slots.shape[1]
    now = holders(slots, num_experts, num_shards).astype(np.float32)
    before = holders(previous, num_experts, num_shards).astype(np.float32)
    members = [np.flatnonzero(nodes == node) for node in range(int(nodes.max()) + 1)]
    sizes = np.array([len(shards) for shards in members])
    renamed = slots.copy()
    for layer, (new, old) in enumerate(zip(now, before, strict=True)):
        together = np.stack([new[shards].sum(axis=0) for shards in members])
        apart = np.stack([old[shards].sum(axis=0) for shards in members])
        common = np.minimum(together[:, None], apart[None]).sum(axis=2)
        common[sizes[:, None] != sizes] = -float(num_experts * num_shards)
        for node, place in zip(*linear_sum_assignment(common, maximize=True), strict=True):
            stays = new[members[node]] @ old[members[place]].T
            source, target = linear_sum_assignment(stays, maximize=True)
            renamed[layer, members[place][target]] = slots[layer, members[node][source]]
    return renamed


def keep_order(slots: Int64Array, previous: Int64Array, num_experts: int) -> Int64Array:
    """The same packing with every expert that stays on its shard in the slot that it has; empty slots come last."""
    num_layers, num_shards, num_slots = slots.shape
    shared = min(num_shards, previous.shape[1])
    place = np.full((num_layers, num_shards, num_experts + 1), num_slots, dtype=np.int64)
    layer, shard = np.ogrid[:num_layers, :num_shards]
    layer, shard = layer[:, :, None], shard[:, :, None]
    old = previous[:, :shared, :num_slots]
    place[layer, shard[:, :shared], old] = np.arange(old.shape[2])
    place[:, :, num_experts] = num_slots
    wanted = place[layer, shard, slots]
    taken = np.zeros((num_layers, num_shards, num_slots + 1), dtype=bool)
    taken[layer, shard, wanted] = True
    free = np.argsort(taken[:, :, :num_slots], axis=2, kind="stable")
    arrivals = np.argsort(np.where(wanted < num_slots, 2 * num_experts, slots), axis=2, kind="stable")
    ordered = np.empty_like(slots)
    # Newcomers, the lowest expert first and empty last, into the free slots; then those that stay over their own.
    ordered[layer, shard, free] = slots[layer, shard, arrivals]
    kept = np.nonzero(wanted < num_slots)
    ordered[kept[0], kept[1], wanted[kept]] = slots[kept]
    return ordered


def grow_from(
    previous: Int64Array,
    loads: Float64Array,
    counts: Int64Array,
    target: Float64Array,
    num_shards: int,
    domain_of_shard: Int64Array | None,
) -> tuple[Packing, Int64Array]:
    """The previous packing, changed as little as its busiest shard having at most target [L] allows.

    counts: int64 [L, E], the numbers of replicas to get to. Returns the packing of those layers where it can be done,
    and which layers these are.
    """
    found = [
        (layer, slots)
        for layer in range(len(loads))
        if (slots := _with_counts(previous[layer], loads[layer], counts[layer], num_shards)) is not None
    ]
    layers = np.array([layer for layer, _ in found], dtype=np.int64)
    if not found:
        return from_slots(np.empty((0, *previous.shape[1:]), dtype=np.int64), loads[:0], counts[:0]), layers
    packing = from_slots(np.stack([slots for _, slots in found]), loads[layers], counts[layers], domain_of_shard)
    level(packing, target[layers], ROUNDS, only_busy=True)
    good = packing.busiest <= target[layers]
    if packing.domains is not None:
        good &= (packing.domains.count <= packing.domains.most[:, None]).all(axis=(1, 2))
    return packing.rows(good), layers[good]


def _with_counts(slots: Int64Array, loads: Float64Array, counts: Int64Array, num_shards: int) -> Int64Array | None:
    """One layer's slots [S, P] with other numbers of replicas: surplus ones leave the busiest shards, new ones go to
    the lightest with a free slot. None if a shard would get two of an expert, or two empty slots."""
    num_experts = len(loads)
    slots = slots.copy()
    size = np.append(loads / counts, 0.0)
    have = np.bincount(slots.ravel(), minlength=num_experts + 1)[:num_experts]
    load = size[slots].sum(axis=1)
    for expert in np.flatnonzero(have > counts):
        shards, places = np.nonzero(slots == expert)
        for at in np.argsort(-load[shards], kind="stable")[: have[expert] - counts[expert]]:
            slots[shards[at], places[at]] = num_experts
            load[shards[at]] -= size[expert]
    missing = np.flatnonzero(have < counts)
    for expert in missing[np.argsort(-size[missing], kind="stable")]:
        for _ in range(counts[expert] - have[expert]):
            empty = slots == num_experts
            open_shards = np.flatnonzero(empty.any(axis=1) & ~(slots == expert).any(axis=1))
            if not len(open_shards):
                return None
            shard = open_shards[load[open_shards].argmin()]
            slots[shard, empty[shard].argmax()] = expert
            load[shard] += size[expert]
    return None if ((slots == num_experts).sum(axis=1) > 1).any() else slots

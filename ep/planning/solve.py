"""Packings whose busiest shard has little load: replicate, pack, level, and again with other numbers of replicas.

Shape legend: B problems (MoE layers, or their nodes), E logical experts, S shards, P slots, L MoE layers, D nodes,
G expert groups.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ep.planning.bound import lower_bound
from ep.planning.levelling import level
from ep.planning.packing import Packing, greedy, published_busiest
from ep.planning.replicas import highest_averages, just_enough
from ep.planning.request import PlanRequest

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

GOOD = 5e-4
"""Relative distance from the bound at which a problem is left alone."""
RETRY = 2e-3
"""Relative distance from the bound above which other numbers of replicas are tried."""
FIRST_ROUNDS, ROUNDS = 16, 64
PROMISING = 0.01
"""How far a candidate may be above the best so far after its first rounds of levelling to get more."""
CANDIDATES = (0.5, 0.7, 0.3, 0.9, 0.1)
"""Where the limits of `just_enough` lie between the least possible load per replica (0) and the bound (1)."""


def solve(loads: Float64Array, num_shards: int, num_redundant: int, domain_of_shard: Int64Array | None) -> Packing:
    """Packings for loads [B, E]. Starts from the published greedy algorithm's and only ever lowers the busiest load."""
    first_counts = counts = highest_averages(loads, num_redundant, num_shards)
    packing = greedy(loads, counts, num_shards, domain_of_shard)
    least = (loads / counts).max(axis=1)  # no counts have less
    bound = np.maximum(loads.sum(axis=1) / num_shards, least)
    level(packing, bound * (1 + GOOD), FIRST_ROUNDS)
    for candidate_idx, candidate in enumerate(CANDIDATES if num_redundant else ()):
        retry = np.flatnonzero(packing.busiest > bound * (1 + RETRY))
        if candidate_idx == 2 and len(retry):  # takes longer than a candidate
            bound[retry] = lower_bound(loads[retry], num_shards, num_redundant, packing.busiest[retry])
            retry = retry[packing.busiest[retry] > bound[retry] * (1 + RETRY)]
        if not len(retry):
            break
        limit = least[retry] + candidate * (bound[retry] - least[retry])
        counts = just_enough(loads[retry], limit, num_redundant, num_shards)
        other = greedy(loads[retry], counts, num_shards, domain_of_shard)
        level(other, bound[retry] * (1 + GOOD), FIRST_ROUNDS)
        near = other.busiest < packing.busiest[retry] * (1 + PROMISING)
        other, retry = other.rows(near), retry[near]
        level(other, bound[retry] * (1 + GOOD), FIRST_ROUNDS)
        better = other.busiest < packing.busiest[retry]
        packing.put(retry[better], other.rows(better))
    level(packing, bound * (1 + GOOD), ROUNDS)
    if num_redundant and (loads.shape[1] + num_redundant) % num_shards == 0:
        # Where the published plan doubles an expert up on a shard, which no placement may, it is no start of ours.
        level(packing, published_busiest(loads, first_counts, num_shards), ROUNDS)
    return packing


def solve_hierarchical(loads: Float64Array, request: PlanRequest) -> Int64Array:
    """Slots [L, S, P] (E where empty) with every group of experts on one node.

    Groups go to nodes by the published greedy packing, and again levelled; the better of the two per layer.
    """
    num_layers, num_experts = loads.shape
    nodes = request.nodes
    num_nodes = int(nodes.max()) + 1
    group_loads = loads.astype(np.float32).reshape(num_layers, request.num_groups, -1).sum(axis=2)
    groups = greedy(group_loads, np.ones(group_loads.shape, dtype=np.int64), num_nodes, None)
    slots, busiest = _solve_nodes(loads, groups.slots, request)
    before = groups.slots.copy()
    level(groups, group_loads.sum(axis=1) / num_nodes, ROUNDS)
    changed = np.flatnonzero((groups.slots != before).any(axis=(1, 2)))
    if len(changed):
        other, other_busiest = _solve_nodes(loads[changed], groups.slots[changed], request)
        better = other_busiest < busiest[changed]
        slots[changed[better]] = other[better]
    in_order = np.full((num_layers, request.num_shards, slots.shape[2]), num_experts, dtype=np.int64)
    in_order[:, np.argsort(nodes, kind="stable")] = slots
    return in_order


def _solve_nodes(loads: Float64Array, groups: Int64Array, request: PlanRequest) -> tuple[Int64Array, Float64Array]:
    """Slots [L, S, P], shards node by node, and the busiest load [L], for groups [L, D, G / D] on each node."""
    num_layers, num_experts = loads.shape
    num_nodes = groups.shape[1]
    shards_here = request.num_shards // num_nodes
    group_size = num_experts // request.num_groups
    experts = (groups[..., None] * group_size + np.arange(group_size)).reshape(num_layers, num_nodes, -1)
    num_slots = -(-(num_experts + request.num_redundant) // request.num_shards)
    slots = np.full((num_layers, num_nodes, shards_here, num_slots), num_experts, dtype=np.int64)
    busiest = np.zeros((num_layers, num_nodes))
    fewest, more = divmod(request.num_redundant, num_nodes)
    for chosen, num_redundant in ((slice(0, more), fewest + 1), (slice(more, num_nodes), fewest)):
        here = experts[:, chosen]
        if here.shape[1]:
            flat = here.reshape(-1, here.shape[2])
            own_loads = np.take_along_axis(loads, here.reshape(num_layers, -1), axis=1).reshape(flat.shape)
            packing = solve(own_loads, shards_here, num_redundant, None)
            names = np.concatenate([flat, np.full((len(flat), 1), num_experts)], axis=1)
            named = np.take_along_axis(names, packing.slots.reshape(len(flat), -1), axis=1)
            shape = (num_layers, here.shape[1], shards_here, packing.slots.shape[2])
            slots[:, chosen, :, : packing.slots.shape[2]] = named.reshape(shape)
            busiest[:, chosen] = packing.busiest.reshape(num_layers, -1)
    return slots.reshape(num_layers, request.num_shards, num_slots), busiest.max(axis=1)

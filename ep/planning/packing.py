"""Replicas in the slots of shards: the state that planning works on, and ways to make a first one.

Shape legend: B problems (MoE layers, or their nodes), S shards, P slots per shard, E logical experts, D domains.
The empty slot is expert E here, with a load of zero: it then takes part in every exchange as any other replica.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass
class Domains:
    """Failure domains. of_shard: int64 [S], 0..D-1. most: int64 [B, E + 1], replicas of an expert per domain.
    count: int64 [B, D, E + 1], how many each domain has."""

    of_shard: Int64Array
    most: Int64Array
    count: Int64Array


@dataclass
class Packing:
    """slots: int64 [B, S, P]. size: float64 [B, E + 1], load of one replica. load: float64 [B, S].
    holds: bool [B, S, E + 1]. No shard holds an expert, nor the empty slot, twice: slots differ by at most one."""

    slots: Int64Array
    size: Float64Array
    load: Float64Array
    holds: BoolArray
    domains: Domains | None = None

    @property
    def busiest(self) -> Float64Array:
        return self.load.max(axis=1)

    def rows(self, chosen: Int64Array | BoolArray) -> Packing:
        """A copy of some problems."""
        domains = self.domains
        if domains is not None:
            domains = Domains(domains.of_shard, domains.most[chosen], domains.count[chosen])
        return Packing(self.slots[chosen], self.size[chosen], self.load[chosen], self.holds[chosen], domains)

    def put(self, chosen: Int64Array | BoolArray, other: Packing) -> None:
        """Replaces some problems by those of `other`, in order."""
        self.slots[chosen], self.size[chosen] = other.slots, other.size
        self.load[chosen], self.holds[chosen] = other.load, other.holds
        if self.domains is not None and other.domains is not None:
            self.domains.most[chosen], self.domains.count[chosen] = other.domains.most, other.domains.count

    def refresh(self) -> None:
        """Adds the loads up anew: exchanges leave rounding behind."""
        self.load = np.take_along_axis(self.size[:, None, :], self.slots, axis=2).sum(axis=2)


def from_slots(
    slots: Int64Array, loads: Float64Array, counts: Int64Array, domain_of_shard: Int64Array | None = None
) -> Packing:
    """The packing of slots [B, S, P] (E where empty) for loads [B, E] and replica counts [B, E].

    domain_of_shard: int64 [S], each of 0..D-1 used, if replicas are to be in different domains.
    """
    num_problems, num_shards, _ = slots.shape
    num_experts = loads.shape[1]
    size = np.concatenate([loads / counts, np.zeros((num_problems, 1))], axis=1)
    holds = np.zeros((num_problems, num_shards, num_experts + 1), dtype=bool)
    problem, shard = np.ogrid[:num_problems, :num_shards]
    holds[problem[:, :, None], shard[:, :, None], slots] = True
    domains = None
    if domain_of_shard is not None:
        num_domains = int(domain_of_shard.max()) + 1
        count = np.stack([holds[:, domain_of_shard == domain].sum(axis=1) for domain in range(num_domains)], axis=1)
        most = np.concatenate(
            [most_per_domain(domain_of_shard)[counts], np.full((num_problems, 1), num_shards)], axis=1
        )
        domains = Domains(domain_of_shard, most, count)
    packing = Packing(slots, size, np.zeros((num_problems, num_shards)), holds, domains)
    packing.refresh()
    return packing


def most_per_domain(domain_of_shard: Int64Array) -> Int64Array:
    """int64 [S + 1]: for r replicas, the least m such that domains with at most m replicas each have room for all."""
    sizes = np.bincount(domain_of_shard)
    room = np.minimum(np.arange(len(domain_of_shard) + 1)[:, None], sizes).sum(axis=1)
    return np.searchsorted(room, np.arange(len(domain_of_shard) + 1))


@dataclass(frozen=True)
class Replicas:
    """All replicas by falling load. expert: int64 [B, N]. size: float64 [B, N]."""

    expert: Int64Array
    size: Float64Array


def neighbours(loads: Float64Array, counts: Int64Array) -> Replicas:
    """Replicas with those of one expert next to each other. counts [B, E] have the same sum N in every problem."""
    size = loads / counts
    order = np.argsort(-size, axis=1, kind="stable")
    problem = np.arange(len(loads))[:, None]
    expert = np.repeat(order.ravel(), counts[problem, order].ravel()).reshape(len(loads), -1)
    return Replicas(expert, size[problem, expert])


def published_order(loads: Float64Array, counts: Int64Array) -> Replicas:
    """Replicas in the order in which the published packing takes them, ties included.

    It sorts the experts, followed by their further replicas as they were given out, with numpy's default sort.
    """
    num_problems, num_experts = loads.shape
    problem = np.arange(num_problems)[:, None]
    further = np.repeat(np.tile(np.arange(num_experts), num_problems), (counts - 1).ravel()).reshape(num_problems, -1)
    column = np.arange(further.shape[1])
    first = np.cumsum(counts - 1, axis=1) - (counts - 1)
    had = column - first[problem, further] + 1  # replicas of its expert when this one was given
    given = np.argsort(-(loads[problem, further] / had), axis=1, kind="stable")
    expert = np.concatenate(
        [np.broadcast_to(np.arange(num_experts), loads.shape), np.take_along_axis(further, given, axis=1)], axis=1
    )
    size = (loads if further.size == 0 else loads / counts)[problem, expert]
    order = np.argsort(-size, axis=1)
    return Replicas(np.take_along_axis(expert, order, axis=1), np.take_along_axis(size, order, axis=1))


def deal(loads: Float64Array, counts: Int64Array, num_shards: int, domain_of_shard: Int64Array | None) -> Packing:
    """Replicas dealt in turn, the largest first; always possible.

    Proof: an expert's replicas are neighbours in the order and at most S, so no shard gets two. With domains the turn
    goes from domain to domain: as long as these have equally many shards, r neighbours meet each of D domains at most
    ceil(r / D) times.
    """
    replicas = neighbours(loads, counts)
    num_problems, num_experts = loads.shape
    turn = np.arange(num_shards) if domain_of_shard is None else domain_turn(domain_of_shard)
    num_slots = -(-replicas.expert.shape[1] // num_shards)
    dealt = np.full((num_problems, num_slots * num_shards), num_experts, dtype=np.int64)
    dealt[:, : replicas.expert.shape[1]] = replicas.expert
    slots = np.empty((num_problems, num_shards, num_slots), dtype=np.int64)
    slots[:, turn] = dealt.reshape(num_problems, num_slots, num_shards).transpose(0, 2, 1)
    return from_slots(slots, loads, counts, domain_of_shard)


def domain_turn(domain_of_shard: Int64Array) -> Int64Array:
    """All shards, one of each domain after the other."""
    rank = np.zeros(len(domain_of_shard), dtype=np.int64)
    for domain in np.unique(domain_of_shard):
        here = domain_of_shard == domain
        rank[here] = np.arange(here.sum())
    return np.lexsort((domain_of_shard, rank))


def greedy(loads: Float64Array, counts: Int64Array, num_shards: int, domain_of_shard: Int64Array | None) -> Packing:
    """Replicas by falling load, each to the lightest shard that may have it; where that gets stuck, `deal`.

    The published EPLB's `balanced_packing` (github.com/deepseek-ai/EPLB), which would put two replicas of an expert on
    one shard. Its plans without such a pair come out the same.
    """
    replicas = published_order(loads, counts)
    num_problems, num_experts = loads.shape
    num_replicas = replicas.expert.shape[1]
    num_slots = -(-num_replicas // num_shards)
    num_full = num_replicas - num_shards * (num_slots - 1)  # shards without an empty slot
    problem = np.arange(num_problems)
    slots = np.full((num_problems, num_shards, num_slots), num_experts, dtype=np.int64)
    load = np.zeros((num_problems, num_shards))  # infinite where a shard is full
    used = np.zeros((num_problems, num_shards), dtype=np.int64)
    full = np.zeros(num_problems, dtype=np.int64)
    closed = np.zeros(num_problems, dtype=bool)  # as many are full as may be
    stuck = np.zeros(num_problems, dtype=bool)
    replicated = (counts > 1)[problem[:, None], replicas.expert].any(axis=0)
    holds = np.zeros((num_problems, num_experts, num_shards), dtype=bool)
    limits = _DomainLimits(counts, domain_of_shard) if domain_of_shard is not None else None
    for (expert, size), has_replicas in zip(_columns(replicas), replicated, strict=True):
        free = load
        if has_replicas:
            free = np.where(holds[problem, expert], np.inf, load)
            if limits is not None:
                free = np.where(limits.reached(problem, expert), np.inf, free)
        shard = free.argmin(axis=1)
        stuck |= ~np.isfinite(free[problem, shard])
        place = used[problem, shard]
        slots[problem, shard, np.minimum(place, num_slots - 1)] = expert
        load[problem, shard] += size
        if has_replicas:
            holds[problem, expert, shard] = True
        if limits is not None:
            limits.add(problem, expert, shard)
        used[problem, shard] = place + 1
        filled = place + 1 >= num_slots - closed
        load[problem, shard] = np.where(filled, np.inf, load[problem, shard])
        if num_full < num_shards:
            full += filled & ~closed
            closing = np.flatnonzero((full == num_full) & ~closed)
            closed[closing] = True
            load[closing] = np.where(used[closing] >= num_slots - 1, np.inf, load[closing])
    if stuck.any():
        slots[stuck] = deal(loads[stuck], counts[stuck], num_shards, domain_of_shard).slots
    return from_slots(slots, loads, counts, domain_of_shard)


def published_busiest(loads: Float64Array, counts: Int64Array, num_shards: int) -> Float64Array:
    """float64 [B]: the busiest load by the published packing, two replicas of an expert on one shard allowed.

    Only where shards divide the replicas, as it asks for.
    """
    replicas = published_order(loads, counts)
    num_slots, rest = divmod(replicas.expert.shape[1], num_shards)
    assert rest == 0, "as many slots on every shard"
    problem = np.arange(len(loads))
    load, shut = np.zeros((2, len(loads), num_shards))
    used = np.zeros((len(loads), num_shards), dtype=np.int64)
    for size in np.ascontiguousarray(replicas.size.T):
        shard = (load + shut).argmin(axis=1)
        load[problem, shard] += size
        used[problem, shard] += 1
        shut[problem, shard] = np.where(used[problem, shard] == num_slots, np.inf, 0.0)
    busiest: Float64Array = load.max(axis=1)
    return busiest


def _columns(replicas: Replicas) -> Iterator[tuple[Int64Array, Float64Array]]:
    yield from zip(np.ascontiguousarray(replicas.expert.T), np.ascontiguousarray(replicas.size.T))


class _DomainLimits:
    """Which shards lie in a domain that has as many replicas of an expert as it may have."""

    def __init__(self, counts: Int64Array, domain_of_shard: Int64Array) -> None:
        self._of_shard = domain_of_shard
        num_domains = int(domain_of_shard.max()) + 1
        self._most = most_per_domain(domain_of_shard)[counts]
        self._count = np.zeros((*counts.shape, num_domains), dtype=np.int64)

    def reached(self, problem: Int64Array, expert: Int64Array) -> BoolArray:
        """bool [B, S]"""
        here = self._count[problem, expert] >= self._most[problem, expert][:, None]
        return here[:, self._of_shard]

    def add(self, problem: Int64Array, expert: Int64Array, shard: Int64Array) -> None:
        self._count[problem, expert, self._of_shard[shard]] += 1

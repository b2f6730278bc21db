"""Local search: pairs of shards exchange the two replicas that bring their loads closest, all pairs at once.

Shape legend: B problems, S shards, P slots per shard, M pairs of shards, E logical experts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ep.planning.packing import BoolArray, Float64Array, Int64Array, Packing

CHECK_EVERY = 8
"""Rounds between looks at which problems are done: dropping them costs a copy of the others."""


def level(packing: Packing, target: Float64Array, max_rounds: int, only_busy: bool = False) -> None:
    """Exchanges replicas in place until every problem's busiest shard has at most target [B], or nothing helps.

    Shards are sorted by load; in round t the k-th busiest meets the (k + t)-th lightest. No exchange raises the higher
    load of its pair, so none raises the busiest shard's. only_busy: leave pairs alone that are within the target, which
    changes less. Deterministic.
    """
    num_pairs = packing.slots.shape[1] // 2
    if num_pairs == 0:
        return
    rows = np.flatnonzero(packing.busiest > target)
    state = packing.rows(rows)
    idle = np.zeros(len(rows), dtype=np.int64)
    for round_idx in range(max_rounds):
        if round_idx % CHECK_EVERY == 0:
            state.refresh()
            done = (state.busiest <= target[rows]) | (idle >= num_pairs)
            if done.any():
                packing.put(rows[done], state.rows(done))
                rows, idle, state = rows[~done], idle[~done], state.rows(~done)
            if not len(rows):
                return
        order = np.argsort(-state.load, axis=1, kind="stable")
        partner = (np.arange(num_pairs) + round_idx) % num_pairs
        least = target[rows] if only_busy else np.full(len(rows), -np.inf)
        changed = _exchange(state, order[:, :num_pairs], order[:, ::-1][:, partner], least)
        idle = np.where(changed, 0, idle + 1)
    state.refresh()
    packing.put(rows, state)


def _exchange(state: Packing, heavy: Int64Array, light: Int64Array, least: Float64Array) -> BoolArray:
    """The best exchange of every pair of shards heavy, light [B, M] that has one and of which one has more than least
    [B]. Returns which problems changed [B]."""
    problem = np.arange(len(heavy))[:, None]
    num_slots = state.slots.shape[2]
    give, take = state.slots[problem, heavy], state.slots[problem, light]
    give_size = state.size[problem[:, :, None], give]
    take_size = state.size[problem[:, :, None], take]
    give_size[~_may_go(state, give, heavy, light)] = -np.inf
    take_size[~_may_go(state, take, light, heavy)] = np.inf
    half = (state.load[problem, heavy] - state.load[problem, light]) / 2
    # An exchange that moves `half` makes the two loads equal; what it leaves is how far it is from that.
    left = give_size[:, :, :, None] - (take_size + half[:, :, None])[:, :, None, :]
    left = np.abs(left, out=left).reshape(*half.shape, num_slots * num_slots)
    best = left.argmin(axis=2)
    helps = np.take_along_axis(left, best[:, :, None], axis=2)[:, :, 0] < half * (1 - 1e-9)
    helps &= state.load[problem, heavy] > least[:, None]
    row, pair = np.nonzero(helps)
    give_slot, take_slot = np.divmod(best[row, pair], num_slots)
    if state.domains is not None:
        keep = _one_replicated(state, row, give[row, pair, give_slot], take[row, pair, take_slot])
        row, pair, give_slot, take_slot = row[keep], pair[keep], give_slot[keep], take_slot[keep]
    swap(state, row, heavy[row, pair], give_slot, light[row, pair], take_slot)
    return helps.any(axis=1)


def _one_replicated(state: Packing, row: Int64Array, give: Int64Array, take: Int64Array) -> BoolArray:
    """Which of the exchanges [n] may go together: one per problem that moves an expert with replicas.

    Several could each find room in a domain where there is room for one of them.
    """
    assert state.domains is not None
    total = state.domains.count.sum(axis=1)
    empty = state.size.shape[1] - 1
    replicated = ((total[row, give] > 1) & (give != empty)) | ((total[row, take] > 1) & (take != empty))
    first = np.zeros(len(row), dtype=bool)
    where = np.flatnonzero(replicated)
    first[where[np.unique(row[where], return_index=True)[1]]] = True
    return ~replicated | first


def _may_go(state: Packing, expert: Int64Array, source: Int64Array, target: Int64Array) -> BoolArray:
    """bool [B, M, P]: replicas of experts [B, M, P] on shards source that shards target [B, M] may hold as well."""
    problem = np.arange(len(expert))[:, None, None]
    free: npt.NDArray[np.bool_] = ~state.holds[problem, target[:, :, None], expert]
    if state.domains is not None:
        domains = state.domains
        here, there = domains.of_shard[source][:, :, None], domains.of_shard[target][:, :, None]
        room = domains.count[problem, there, expert] < domains.most[problem, expert]
        free &= room | (here == there)
    return free


def swap(
    state: Packing, row: Int64Array, shard: Int64Array, slot: Int64Array, other: Int64Array, other_slot: Int64Array
) -> None:
    """Exchanges slots of two shards, in several problems [n] or in several disjoint pairs of shards of one."""
    here, there = state.slots[row, shard, slot], state.slots[row, other, other_slot]
    moved = state.size[row, here] - state.size[row, there]
    state.slots[row, shard, slot], state.slots[row, other, other_slot] = there, here
    state.holds[row, shard, here] = state.holds[row, other, there] = False
    state.holds[row, shard, there] = state.holds[row, other, here] = True
    state.load[row, shard] -= moved
    state.load[row, other] += moved
    if state.domains is not None:
        count, domain = state.domains.count, state.domains.of_shard
        for expert, source, target in ((here, shard, other), (there, other, shard)):
            np.subtract.at(count, (row, domain[source], expert), 1)
            np.add.at(count, (row, domain[target], expert), 1)

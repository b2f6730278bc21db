"""Migrations: replayed slot by slot in a simulated memory, cut off anywhere, and beside an exhaustive search."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep.errors import PlacementError
from ep.migration import DISK, Step, payback, plan_steps, union
from ep.placement import EMPTY, Placement, with_spares

Sets = list[list[set[int]]]  # experts of each shard, per layer
EXPERT_BYTES = 1000


def placement_of(sets: Sets, num_experts: int, num_slots: int, rng: np.random.Generator) -> Placement:
    """Every set in random slots of its shard."""
    slots = np.full((len(sets), len(sets[0]), num_slots), EMPTY)
    for layer, shards in enumerate(sets):
        for shard, experts in enumerate(shards):
            slots[layer, shard, rng.permutation(num_slots)[: len(experts)]] = sorted(experts)
    return Placement(int(rng.integers(10)), num_experts, slots)


def sets_of(placement: Placement) -> Sets:
    return [[set(shard[shard != EMPTY].tolist()) for shard in layer] for layer in placement.slots]


def largest(*many: Sets) -> int:
    return max(len(experts) for sets in many for layer in sets for experts in layer)


def random_sets(rng: np.random.Generator, shape: tuple[int, int, int], extra: int, shards: list[int]) -> Sets:
    """Experts spread over some of the shards, `extra` tries at a replica per layer."""
    num_layers, num_shards, num_experts = shape
    layers: Sets = [[set() for _ in range(num_shards)] for _ in range(num_layers)]
    for layer in layers:
        for expert in range(num_experts):
            layer[rng.choice(shards)].add(expert)
        for _ in range(extra):
            layer[rng.choice(shards)].add(int(rng.integers(num_experts)))
    return layers


@st.composite
def migrations(draw: st.DrawFn, min_spares: int = 1) -> tuple[Placement, Placement]:
    """Placements of the same layers, shards and experts; the first has spares, different ones on each shard."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shards = list(range(shape[1]))
    now, then = (random_sets(rng, shape, draw(st.integers(0, 6)), shards) for _ in range(2))
    num_slots = max(largest(now) + draw(st.integers(min_spares, 3)), largest(then))
    target_slots = largest(then) + draw(st.integers(0, 2))
    return placement_of(now, shape[2], num_slots, rng), placement_of(then, shape[2], target_slots, rng)


class Memory:
    """What lies in each slot of each shard, junk included: EMPTY slots of a placement are not cleared."""

    def __init__(self, placement: Placement) -> None:
        self.slots = {tuple(where): int(expert) for where, expert in np.ndenumerate(placement.slots)}

    def holds(self, placement: Placement) -> bool:
        return all(self.slots[where] == expert for where, expert in np.ndenumerate(placement.slots) if expert != EMPTY)

    def copy(self, start: Placement, step: Step, chosen: list[int]) -> None:
        """The chosen transfers of a step; checks each."""
        for index in chosen:
            move = step.transfers[index]
            target = move.layer_pos, move.to_shard, move.to_slot
            assert start.slots[target] == EMPTY
            assert step.placement.slots[target] == move.expert_idx
            if move.from_shard != DISK:
                source = move.layer_pos, move.from_shard, move.from_slot
                assert start.slots[source] == move.expert_idx == self.slots[source]
            self.slots[target] = move.expert_idx


def replay(current: Placement, target: Placement, steps: tuple[Step, ...]) -> None:
    """Every step is one that a serving system can take, and they end in the target with the fewest transfers."""
    memory, start = Memory(current), current
    for step in steps:
        assert step.placement.generation == start.generation + 1
        assert step.placement.slots.shape == current.slots.shape
        assert step.num_bytes == len(step.transfers) * EXPERT_BYTES
        written = [(move.layer_pos, move.to_shard, move.to_slot) for move in step.transfers]
        assert len(set(written)) == len(written)
        memory.copy(start, step, list(range(len(step.transfers))))
        assert memory.holds(start) and memory.holds(step.placement)
        both = union(start, step.placement)
        assert all(memory.slots[where] == expert for where, expert in np.ndenumerate(both) if expert != EMPTY)
        kept = (start.slots != EMPTY) & (step.placement.slots != EMPTY)
        assert (start.slots == step.placement.slots)[kept].all()
        assert not np.array_equal(start.slots, step.placement.slots)
        start = step.placement
    now, then = sets_of(current), sets_of(target)
    assert sets_of(start) == then
    fewest = sum(len(b - a) for before, after in zip(now, then) for a, b in zip(before, after))
    assert sum(len(step.transfers) for step in steps) == fewest


@given(migrations())
def test_every_step_can_be_served(migration: tuple[Placement, Placement]) -> None:
    current, target = migration
    steps = plan_steps(current, target, EXPERT_BYTES)
    replay(current, target, steps)
    assert all(move.from_shard != DISK for step in steps for move in step.transfers)


@given(migrations(), st.data())
def test_a_step_that_is_cut_off_leaves_the_generation_before_it(
    migration: tuple[Placement, Placement], data: st.DataObject
) -> None:
    memory, start = Memory(migration[0]), migration[0]
    for step in plan_steps(*migration, EXPERT_BYTES):
        order = data.draw(st.permutations(range(len(step.transfers))))
        done = data.draw(st.integers(0, len(order)))
        memory.copy(start, step, order[:done])
        assert memory.holds(start)
        again = plan_steps(start, migration[1], EXPERT_BYTES)
        assert again[0].transfers == step.transfers
        memory.copy(start, step, order)
        start = step.placement


@given(migrations())
def test_layers_do_not_wait_for_each_other(migration: tuple[Placement, Placement]) -> None:
    current, target = migration
    alone = []
    for layer in range(current.num_moe_layers):
        one, other = (Placement(0, p.num_experts, p.slots[layer : layer + 1]) for p in migration)
        alone.append(len(plan_steps(one, other, EXPERT_BYTES)))
    assert len(plan_steps(current, target, EXPERT_BYTES)) == max(alone)


@pytest.mark.parametrize("num_spares", [1, 2])
@pytest.mark.parametrize("seed", range(20))
def test_shards_that_are_full_when_all_is_done(seed: int, num_spares: int) -> None:
    """Rings of swaps that a wrong order would lock for ever: the target leaves no empty slot on most shards."""
    rng = np.random.default_rng(seed)
    shards = list(range(8))
    now, then = (random_sets(rng, (4, 8, 24), 0, shards) for _ in range(2))
    for before, after in zip(now, then):
        for a, b in zip(before, after):
            wish = rng.permutation(24).tolist()
            while len(b) < len(a) + num_spares:
                b.add(wish.pop())
    num_slots = max(largest(now) + num_spares, largest(then))
    current, target = placement_of(now, 24, num_slots, rng), placement_of(then, 24, num_slots, rng)
    replay(current, target, plan_steps(current, target, EXPERT_BYTES))


def fewest_steps(current: Placement, target: Placement) -> int | None:
    """Of one layer, by trying everything that a step may do; None where nothing leads to the target."""
    (now,), (then,) = sets_of(current), sets_of(target)
    reached = {tuple(map(frozenset, now))}
    goal, level, num_steps = tuple(map(frozenset, then)), set(reached), 0
    while level:
        if goal in level:
            return num_steps
        num_steps += 1
        following = set()
        for shards in level:
            options = []
            for experts, wanted in zip(shards, goal):
                room = min(current.slots_per_shard - len(experts), len(wanted - experts))
                leaving = sorted(experts - wanted)
                options.append(
                    [
                        (experts | set(landed)) - set(left)
                        for landed in combinations(sorted(wanted - experts), room)
                        for size in range(len(leaving) + 1)
                        for left in combinations(leaving, size)
                    ]
                )
            following |= {new for new in product(*options) if len(frozenset().union(*new)) == current.num_experts}
        level = following - reached
        reached |= level
    return None


def test_as_few_steps_as_an_exhaustive_search_finds() -> None:
    """Always a way where there is one; greedy, so not always the shortest."""
    rng = np.random.default_rng(0)
    more: list[int] = []
    num_stuck = 0
    while len(more) < 1500:
        shape = 1, int(rng.integers(2, 5)), int(rng.integers(2, 7))
        now, then = (random_sets(rng, shape, int(rng.integers(3)), list(range(shape[1]))) for _ in range(2))
        if sum(len(a - b) for a, b in zip(now[0], then[0])) > 5:
            continue
        num_slots = max(largest(now, then), largest(now) + int(rng.integers(2)))
        current, target = (placement_of(sets, shape[2], num_slots, rng) for sets in (now, then))
        fewest = fewest_steps(current, target)
        if fewest is None:
            num_stuck += 1
            with pytest.raises(PlacementError, match="only swap single copies in MoE layer 0 and have 0 empty slots"):
                plan_steps(current, target, EXPERT_BYTES)
            replay(with_spares(current, 1), target, plan_steps(with_spares(current, 1), target, EXPERT_BYTES))
            continue
        steps = plan_steps(current, target, EXPERT_BYTES)
        replay(current, target, steps)
        more.append(len(steps) - fewest)
    assert min(more) == 0
    assert np.mean(np.array(more) > 0) < 0.01
    assert num_stuck > 10


@pytest.mark.parametrize("num_spares", [1, 2, 3, 4, 6])
def test_a_swap_takes_as_many_steps_as_its_experts_need_spares(num_spares: int) -> None:
    current = Placement(3, 12, np.arange(12).reshape(1, 2, 6))
    target = Placement(0, 12, current.slots[:, ::-1])
    steps = plan_steps(with_spares(current, num_spares), target, EXPERT_BYTES)
    assert len(steps) == math.ceil(6 / num_spares)
    assert steps[-1].placement.generation == 3 + len(steps)


def test_nothing_to_do() -> None:
    current = Placement(0, 4, np.array([[[0, 1, EMPTY], [2, 3, EMPTY]]]))
    assert plan_steps(current, Placement(9, 4, np.array([[[1, 0], [3, 2]]])), EXPERT_BYTES) == ()


def test_a_replica_that_leaves_makes_room_first() -> None:
    """No spares anywhere: shard 0 drops its second copy of 3 before it can take 2."""
    current = Placement(0, 4, np.array([[[0, 1, 3], [2, 3, EMPTY]]]))
    target = Placement(0, 4, np.array([[[0, 1, 2], [3, EMPTY, EMPTY]]]))
    first, second = plan_steps(current, target, EXPERT_BYTES)
    assert first.transfers == () and first.num_bytes == 0
    assert [(move.expert_idx, move.to_shard, move.to_slot) for move in second.transfers] == [(2, 0, 2)]


def test_the_hole_is_not_given_away_before_the_ring_has_used_it() -> None:
    """Shards 0 and 1 swap 0 and 1. Shard 2 lacks holes the most, but would keep the one that shard 0 gave it for 2."""
    current = Placement(0, 13, np.array([[[0, 11, 12, EMPTY], [1, 7, 9, 10], [2, 3, 4, 8], [5, 6, EMPTY, EMPTY]]]))
    target = Placement(0, 13, np.array([[[1, 2, 11, 12], [0, 7, 9, 10], [5, 6, 7, 8], [3, 4, 5, 6]]]))
    steps = plan_steps(current, target, EXPERT_BYTES)
    replay(current, target, steps)
    assert [move.expert_idx for move in steps[0].transfers if move.to_shard == 0] == [1]


def test_the_copy_is_kept_where_it_blocks_no_ring() -> None:
    """Shards 0 and 1 swap 0 and 1 without a hole, but shard 2, which lacks holes the most, can keep 0 until then."""
    current = Placement(0, 10, np.array([[[0, 5, 6], [1, 7, 8], [0, 2, 9], [3, 4, EMPTY]]]))
    target = Placement(0, 10, np.array([[[1, 5, 6], [0, 7, 8], [3, 4, 9], [2, 3, 4]]]))
    steps = plan_steps(current, target, EXPERT_BYTES)
    replay(current, target, steps)
    assert 0 not in steps[0].placement.slots[0, 0] and 0 in steps[0].placement.slots[0, 2]


@pytest.mark.parametrize(("num_spares", "num_steps"), [(2, 4), (3, 3), (4, 2)])
def test_a_complete_replan_uses_every_hole(num_spares: int, num_steps: int) -> None:
    """32 shards of 9 slots. Each step can use the spares, and from the second one on those of 32 replicas that left."""
    rng = np.random.default_rng(0)

    def placement() -> Placement:
        slots = np.full((4, 32, 9), EMPTY)
        for layer in slots:
            experts = rng.permutation(256)
            layer[:, :8] = experts.reshape(32, 8)
            layer[:, 8] = np.roll(experts, 8)[:256:8]
        return Placement(0, 256, slots)

    current, target = with_spares(placement(), num_spares), placement()
    steps = plan_steps(current, target, EXPERT_BYTES)
    replay(current, target, steps)
    num_transfers = sum(len(step.transfers) for step in steps) / 4
    assert 32 * (num_spares * (num_steps - 1) + num_steps - 2) < num_transfers
    assert len(steps) == num_steps


@given(migrations(), st.data())
def test_lost_shards_send_nothing(migration: tuple[Placement, Placement], data: st.DataObject) -> None:
    """The lost shards end up without experts; what only they held comes from disk, all else from a shard."""
    current = migration[0]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    shards = list(range(current.num_shards))
    live = data.draw(st.lists(st.sampled_from(shards), min_size=1, unique=True))
    lost = [shard for shard in shards if shard not in live]
    shape = current.num_moe_layers, current.num_shards, current.num_experts
    then = random_sets(rng, shape, data.draw(st.integers(0, 4)), live)
    current = with_spares(current, max(largest(then) - current.slots_per_shard, 0))
    target = placement_of(then, shape[2], largest(then), rng)
    steps = plan_steps(current, target, EXPERT_BYTES, lost=lost)
    replay(current, target, steps)
    start = current
    reachable = np.array([[(layer[live] == e).any() for e in range(shape[2])] for layer in start.slots])
    for step in steps:
        for move in step.transfers:
            assert move.to_shard in live and move.from_shard not in lost
            anywhere = (start.slots[move.layer_pos, live] == move.expert_idx).any()
            assert (move.from_shard == DISK) == (move.from_slot == DISK) == (not anywhere)
        start = step.placement
        after = np.array([[(layer[live] == e).any() for e in range(shape[2])] for layer in start.slots])
        assert not (reachable & ~after).any()
        reachable = after


@pytest.mark.parametrize("there", [0, EMPTY])
def test_the_last_copy_in_reach_stays_until_another_has_landed(there: int) -> None:
    """Expert 0 lies on lost shard 2, too, for good or not: that copy does not let the one on shard 0 go."""
    current = Placement(0, 3, np.array([[[0, EMPTY], [1, 2], [0, EMPTY]]]))
    target = Placement(0, 3, np.array([[[1, EMPTY], [0, 2], [there, EMPTY]]]))
    steps = plan_steps(current, target, EXPERT_BYTES, lost=[2])
    assert [[(move.expert_idx, move.from_shard) for move in step.transfers] for step in steps] == [[(1, 1)], [(0, 0)]]


def test_senders_are_level_and_near() -> None:
    current = Placement(0, 4, np.array([[[0, 1, 2, 3], [0, 1, 2, 3], [EMPTY] * 4]]))
    target = Placement(0, 4, np.array([[[0, 1, 2, 3]] * 3]))
    (step,) = plan_steps(current, target, EXPERT_BYTES)
    assert sorted(move.from_shard for move in step.transfers) == [0, 0, 1, 1]
    (step,) = plan_steps(current, target, EXPERT_BYTES, node_of_shard=["a", "b", "b"])
    assert [move.from_shard for move in step.transfers] == [1] * 4
    (step,) = plan_steps(current, target, EXPERT_BYTES, node_of_shard=["a", "b", "c"])
    assert sorted(move.from_shard for move in step.transfers) == [0, 0, 1, 1]


SWAP = Placement(0, 4, np.array([[[0, 1], [2, 3]], [[0, 1], [2, 3]]]))


@pytest.mark.parametrize(
    ("slots", "options", "message"),
    [
        ([[[0, 1], [2, 3]], [[0, 2], [1, 3]]], {}, r"shards \[0, 1\] only swap .* layer 1 .* 1 spare slot per shard"),
        ([[[0, 1], [2, 3]]], {}, r"target has \(1, 2, 4\) .*, expected \(2, 2, 4\)"),
        ([[[0, 1], [2, 3]]] * 2, {"node_of_shard": ["a"]}, "nodes of 1 shards given, expected 2"),
        ([[[0, 1], [2, 3]]] * 2, {"lost": [2]}, "lost shard is 2, expected 0 to 1"),
        ([[[0, 1, 2], [2, 3, EMPTY]]] * 2, {}, "3 experts on shard 0 in MoE layer 0, which has 2 slots; 1 more spare"),
    ],
)
def test_migrations_that_cannot_be(slots: list[object], options: dict[str, list[int]], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        plan_steps(SWAP, Placement(0, 4, np.array(slots)), EXPERT_BYTES, **options)  # type: ignore[arg-type]


def test_nothing_lands_on_a_lost_shard() -> None:
    target = Placement(0, 4, np.array([[[0, 1, EMPTY], [0, 2, 3]]] * 2))
    with pytest.raises(PlacementError, match="moves expert 0 of MoE layer 0 to shard 1, but that shard is lost"):
        plan_steps(with_spares(SWAP, 1), target, EXPERT_BYTES, lost=[1])


def test_generations_that_clash_have_no_union() -> None:
    other = Placement(1, 4, np.array([[[0, 1], [2, 3]], [[0, 2], [1, 3]]]))
    with pytest.raises(PlacementError, match=r"slot 1 of shard 0 in MoE layer 1 holds expert 1 .* and 2 .*\(2 such"):
        union(SWAP, other)
    with pytest.raises(PlacementError, match=r"have slots \(2, 2, 2\) and \(2, 2, 3\)"):
        union(SWAP, with_spares(SWAP, 1))


def test_a_union_has_the_slots_of_both() -> None:
    a = Placement(0, 2, np.array([[[0, EMPTY, EMPTY], [1, EMPTY, EMPTY]]]))
    b = Placement(1, 2, np.array([[[0, 1, EMPTY], [EMPTY, 0, EMPTY]]]))
    both = union(a, b)
    assert both.tolist() == [[[0, 1, EMPTY], [1, 0, EMPTY]]] and both.dtype == np.int32


@given(migrations(), st.integers(0, 2**32), st.floats(1e-6, 1e-3), st.floats(1, 600))
def test_payback_is_the_busiest_shards_time_over_the_transfers(
    migration: tuple[Placement, Placement], seed: int, pair_seconds: float, window_seconds: float
) -> None:
    current, target = migration
    loads = np.random.default_rng(seed).integers(0, 1000, (current.num_moe_layers, current.num_experts))
    saved = 0.0
    for layer, (before, after) in enumerate(zip(sets_of(current), sets_of(target))):
        for shards, sign in ((before, 1), (after, -1)):
            copies = {expert: sum(expert in shard for shard in shards) for expert in range(current.num_experts)}
            saved += sign * max(sum(loads[layer, expert] / copies[expert] for expert in shard) for shard in shards)
    found = payback(loads, current, target, pair_seconds, window_seconds, 5_000, 1e6, 60.0)
    assert found.gain == pytest.approx(saved * pair_seconds / window_seconds, rel=1e-9, abs=1e-12)
    assert found.cost_s == pytest.approx(0.005)
    if saved > 1e-6:
        assert found.pays_back_after_s == pytest.approx(0.005 / found.gain)
        assert found.worthwhile == (0.005 / found.gain <= 60)
    elif saved < -1e-6:
        assert found.pays_back_after_s == math.inf and not found.worthwhile


@pytest.mark.parametrize(
    ("loads", "horizon_s", "worthwhile", "line"),
    [
        (
            [40, 40, 10, 10],
            600.0,
            True,
            "gain 15 ms per second of serving, cost 2.5 s for 5 GB: pays back after 2.8 min (horizon 10.0 min)",
        ),
        (
            [40, 40, 10, 10],
            60.0,
            False,
            "gain 15 ms per second of serving, cost 2.5 s for 5 GB: pays back after 2.8 min (horizon 60 s)",
        ),
        (
            [40, 10, 40, 10],
            1e6,
            False,
            "gain -15 ms per second of serving, cost 2.5 s for 5 GB: never pays back (horizon 277.8 h)",
        ),
    ],
)
def test_payback_in_words(loads: list[float], horizon_s: float, worthwhile: bool, line: str) -> None:
    current = Placement(0, 4, np.array([[[0, 1], [2, 3]]]))
    target = Placement(0, 4, np.array([[[0, 2], [1, 3]]]))
    found = payback([loads], current, target, 0.005, 10.0, 5_000_000_000, 2e9, horizon_s)
    assert found.describe() == line
    assert found.worthwhile is worthwhile


def test_no_gain_is_not_worthwhile_within_any_horizon() -> None:
    assert not payback(np.ones((2, 4)), SWAP, SWAP, 1e-6, 1.0, 0, 1e9, math.inf).worthwhile


def test_loads_of_another_model() -> None:
    with pytest.raises(PlacementError, match=r"loads have shape \(2, 5\), expected \(2, 4\)"):
        payback(np.zeros((2, 5)), SWAP, SWAP, 1e-6, 1.0, 0, 1e9, 60.0)

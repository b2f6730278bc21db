"""How to get from one placement to another while both are served. Pure: no I/O.

A placement's slot index is the physical slot of the shard's memory, and some slots are EMPTY. In a step the shards
serve generation g and g + 1 at once: a new expert only goes into a slot that is EMPTY in g, one that stays keeps its
slot, and one that leaves has its slot EMPTY in g + 1, free to be written in the next step.

Shape legend: L MoE layers, S shards, P slots per shard and layer, E logical experts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ep.errors import PlacementError
from ep.placement import EMPTY, Int32Array, Placement
from ep.planning.plan import shard_load

DISK = -1


@dataclass(frozen=True)
class Transfer:
    """One expert of one layer into one slot. from_shard and from_slot are DISK where no shard can give it."""

    layer_pos: int
    expert_idx: int
    to_shard: int
    to_slot: int
    from_shard: int
    from_slot: int


@dataclass(frozen=True)
class Step:
    """placement: what is served after it. transfers: what must be copied before."""

    placement: Placement
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True)
class Payback:
    """Whether a move is worth its cost. load_now, load_planned: pairs on the busiest shard, summed over layers.

    gain: seconds saved per second of serving. cost_s: of the copies. pays_back_after_s: inf where nothing is gained.
    """

    load_now: float
    load_planned: float
    gain: float
    num_bytes: int
    cost_s: float
    pays_back_after_s: float
    worthwhile: bool

    def describe(self) -> str:
        """Both figures in one line."""
        gain = f"gain {1e3 * self.gain:.3g} ms per second of serving"
        cost = f"cost {self.cost_s:.3g} s for {self.num_bytes / 1e6:.1f} MB"
        if math.isinf(self.pays_back_after_s):
            return f"{gain}, {cost}: never pays back"
        return f"{gain}, {cost}: pays back after {self.pays_back_after_s:.3g} s"


def plan_steps(
    current: Placement,
    target: Placement,
    node_of_shard: Sequence[str] | None = None,
    lost: Collection[int] = (),
) -> tuple[Step, ...]:
    """Steps from `current` to the experts that `target` puts on each shard (its order of slots does not matter).

    Only experts that a shard lacks are copied. Generations count on from current's. Sources: a shard of the same node,
    then the one that sends least in the step; never one of `lost`. One EMPTY slot per shard beyond the target's is
    always enough. Raises PlacementError where the slots are too few.
    """
    shape = (current.num_moe_layers, current.num_shards, current.num_experts)
    if shape != (target.num_moe_layers, target.num_shards, target.num_experts):
        raise PlacementError(f"migration: layers, shards and experts change from {shape}")
    wanted = [[_experts(slots) for slots in layer] for layer in target.slots]
    most = max(len(experts) for layer in wanted for experts in layer)
    if most > current.slots_per_shard:
        raise PlacementError(f"migration: {most} slots needed on a shard, expected at most {current.slots_per_shard}")
    nodes = list(node_of_shard) if node_of_shard is not None else [""] * current.num_shards
    steps: list[Step] = []
    slots = current.slots
    while True:
        after = slots.copy()
        sent: Counter[int] = Counter()
        transfers = [
            transfer
            for layer_pos in range(current.num_moe_layers)
            for transfer in _advance(
                layer_pos, slots[layer_pos], after[layer_pos], wanted[layer_pos], nodes, lost, sent
            )
        ]
        if np.array_equal(after, slots):
            break
        placement = Placement(current.generation + len(steps) + 1, current.num_experts, after)
        steps.append(Step(placement, tuple(transfers)))
        slots = after
    reached = all(
        _experts(slots[layer, shard]) == wanted[layer][shard] for layer in range(shape[0]) for shard in range(shape[1])
    )
    if not reached:
        raise PlacementError("migration: no slot is free to move into, expected one spare slot on every shard")
    return tuple(steps)


def union(first: Placement, second: Placement) -> Int32Array:
    """int32 [L, S, P]: what slots hold while both placements are served. Raises PlacementError where they clash."""
    if first.slots.shape != second.slots.shape:
        raise PlacementError(f"placements have shapes {first.slots.shape} and {second.slots.shape}")
    clash = (first.slots != second.slots) & (first.slots != EMPTY) & (second.slots != EMPTY)
    if clash.any():
        layer, shard, slot = np.argwhere(clash)[0]
        raise PlacementError(f"MoE layer {layer}: slot {slot} of shard {shard} holds one expert here, another there")
    return np.where(first.slots == EMPTY, second.slots, first.slots)


def payback(
    loads: npt.NDArray[np.integer | np.floating],
    current: Placement,
    target: Placement,
    pair_seconds: float,
    window_seconds: float,
    num_bytes: int,
    bytes_per_second: float,
    horizon_s: float,
) -> Payback:
    """Weighs a move. loads [L, E]: (token, expert) pairs of window_seconds; pair_seconds: compute of one pair.

    A layer takes as long as its busiest shard, an expert's load is split evenly over its replicas, and the load stays
    what it was: gain = (busiest now - busiest planned, summed over layers) x pair_seconds / window_seconds. The copies
    are counted as if they went over one link after the other and nothing else did.
    """
    now, planned = (
        float(shard_load(placement, loads).max(axis=1).sum()) for placement in (current, target)
    )
    gain = (now - planned) * pair_seconds / window_seconds if window_seconds > 0 else 0.0
    cost = num_bytes / bytes_per_second
    after = cost / gain if gain > 0 else math.inf
    return Payback(now, planned, gain, num_bytes, cost, after, after <= horizon_s)


def _advance(
    layer_pos: int,
    before: Int32Array,
    after: Int32Array,
    wanted: Sequence[set[int]],
    nodes: Sequence[str],
    lost: Collection[int],
    sent: Counter[int],
) -> list[Transfer]:
    """One layer's part of a step: fills `after` [S, P], which is `before` at first.

    An expert leaves a shard once a shard that is to keep it has it. Were every shard that misses some full, each would
    hold more experts that cannot leave than it misses, though each of those is missing on another of them: with one
    spare slot per shard there is always a next move.
    """
    holds = [_experts(slots) for slots in before]
    found: dict[int, list[int]] = {}
    for shard, experts in enumerate(holds):
        for expert in experts:
            found.setdefault(expert, []).append(shard)
    transfers = []
    for shard, slots in enumerate(before):
        free = np.flatnonzero(slots == EMPTY)
        for expert, slot in zip(sorted(wanted[shard] - holds[shard]), free.tolist()):
            after[shard, slot] = expert
            sources = [source for source in found[expert] if source not in lost]
            source = min(sources, key=lambda s: (nodes[s] != nodes[shard], sent[s], s), default=DISK)
            from_slot = int(np.flatnonzero(before[source] == expert)[0]) if source != DISK else DISK
            sent[source] += 1
            transfers.append(Transfer(layer_pos, expert, shard, slot, source, from_slot))
    arrived = [_experts(slots) for slots in after]
    settled = {expert for shard, experts in enumerate(arrived) for expert in experts & wanted[shard]}
    kept: set[int] = set()
    for shard, slots in enumerate(before):
        for expert in sorted(holds[shard] - wanted[shard]):
            if expert in settled or expert in kept:
                after[shard, slots == expert] = EMPTY
            else:
                kept.add(expert)
    return transfers


def _experts(slots: Int32Array) -> set[int]:
    return set(slots[slots != EMPTY].tolist())

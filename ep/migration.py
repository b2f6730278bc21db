"""From one placement to another while both are served. Pure: no I/O.

During a step a shard answers requests of the generation before it and of the one after it. So an expert is written only
into a slot that is EMPTY before the step, one that stays keeps its slot, and one that leaves keeps its memory until all
routers have moved on: its slot can be written in the next step. A step that ends half-way has changed nothing that the
generation before it uses.

Shape legend: L MoE layers, S shards, P slots per shard, E logical experts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ep.errors import PlacementError
from ep.migration_layer import BoolArray, LayerMigration, LayerStep
from ep.placement import EMPTY, Int32Array, Placement

DISK = -1


@dataclass(frozen=True)
class Transfer:
    """One expert of one MoE layer into a slot. from_shard and from_slot are DISK where no live shard holds it."""

    layer_pos: int
    expert_idx: int
    to_shard: int
    to_slot: int
    from_shard: int
    from_slot: int


@dataclass(frozen=True)
class Step:
    """What one generation changes: the transfers, in any order, and the placement that is valid after all of them."""

    placement: Placement
    transfers: tuple[Transfer, ...]
    num_bytes: int


def plan_steps(
    current: Placement,
    target: Placement,
    expert_bytes: int,
    node_of_shard: Sequence[str] | None = None,
    lost: Collection[int] = (),
) -> tuple[Step, ...]:
    """The generations that lead from `current` to the experts that `target` has on each shard; none if they are there.

    Of `target` only the set of experts per shard and layer counts, neither slots nor generation; `current` is the
    running placement, whose EMPTY slots are all the memory there is. expert_bytes: one expert of one layer.
    node_of_shard [S]: an expert comes from a shard of the same node if there is one, and of those that are left from
    the one that sends least in the step. lost: shards that can neither send nor receive.

    Transfers are the fewest possible, one for each expert of `target` that is not on its shard already. Every step
    moves what there is room for in all layers. Their number is the smallest in nearly all cases, not in all: see
    ep.migration_layer.

    Raises PlacementError for placements of different layers, shards or experts, for a target that needs more slots than
    there are, for an expert that is to land on a lost shard, and where shards swap single copies without a spare slot.
    """
    held, wanted = _experts(current), _experts(target)
    _check(current, held, wanted, node_of_shard, lost)
    holes = (current.slots == EMPTY).sum(axis=2).tolist()
    layers = [
        LayerMigration(layer_pos, held[layer_pos], wanted[layer_pos], holes[layer_pos], lost)
        for layer_pos in np.flatnonzero((held != wanted).any(axis=(1, 2))).tolist()
    ]
    steps: list[Step] = []
    placement = current
    while layers:
        slots = placement.slots.copy()
        landings = [
            landing for layer in layers for landing in _apply(slots[layer.layer_pos], layer.layer_pos, layer.step())
        ]
        transfers = _with_sources(landings, placement, node_of_shard, lost)
        placement = Placement(placement.generation + 1, current.num_experts, slots)
        steps.append(Step(placement, transfers, len(transfers) * expert_bytes))
        layers = [layer for layer in layers if not layer.done]
    return tuple(steps)


def union(a: Placement, b: Placement) -> Int32Array:
    """int32 [L, S, P]: what a shard that restarts must hold while generations a and b are both served.

    Raises PlacementError for different shapes and for a slot that holds one expert in a and another in b.
    """
    if a.slots.shape != b.slots.shape:
        raise PlacementError(
            f"generations {a.generation} and {b.generation} have slots {a.slots.shape} and {b.slots.shape}, expected "
            "the same [layers, shards, slots per shard]"
        )
    clashes = np.argwhere((a.slots != b.slots) & (a.slots != EMPTY) & (b.slots != EMPTY))
    if len(clashes):
        layer_pos, shard, slot = clashes[0].tolist()
        raise PlacementError(
            f"slot {slot} of shard {shard} in MoE layer {layer_pos} holds expert {a.slots[layer_pos, shard, slot]} in "
            f"generation {a.generation} and {b.slots[layer_pos, shard, slot]} in {b.generation} "
            f"({len(clashes)} such slots in all)"
        )
    return np.where(a.slots != EMPTY, a.slots, b.slots)


@dataclass(frozen=True)
class Payback:
    """Whether a migration is worth its cost.

    gain: seconds saved per second of serving. cost_s: seconds that the transfers take. pays_back_after_s: inf without
    a gain.
    """

    gain: float
    num_bytes: int
    cost_s: float
    pays_back_after_s: float
    horizon_s: float

    @property
    def worthwhile(self) -> bool:
        return self.gain > 0 and self.pays_back_after_s <= self.horizon_s

    def describe(self) -> str:
        """One line: gain and cost."""
        after = self.pays_back_after_s
        verdict = "never pays back" if math.isinf(after) else f"pays back after {_time(after)}"
        return (
            f"gain {_time(self.gain)} per second of serving, cost {_time(self.cost_s)} for {_size(self.num_bytes)}: "
            f"{verdict} (horizon {_time(self.horizon_s)})"
        )


def payback(
    loads_now: npt.ArrayLike,
    current: Placement,
    target: Placement,
    pair_seconds: float,
    window_seconds: float,
    num_bytes: int,
    bytes_per_second: float,
    horizon_s: float,
) -> Payback:
    """Predicts gain and cost of a migration.

    loads_now: [L, E], (token, expert) pairs of each logical expert in a window of window_seconds. pair_seconds: what
    one pair costs a shard. num_bytes, bytes_per_second: the transfers and the rate at which they were measured.

        gain = sum over layers of (busiest shard's pairs in current - in target) x pair_seconds / window_seconds
        cost = num_bytes / bytes_per_second;  pays back after cost / gain

    Assumes that a layer lasts as long as its busiest shard, that this time grows linearly with its pairs, that an
    expert's pairs split evenly over its replicas, that the next windows are like this one, and, on the side of the
    cost, that serving stands still during the transfers, which it does not: the figure is an upper bound.
    Raises PlacementError where shapes differ.
    """
    assert pair_seconds >= 0 and window_seconds > 0 and num_bytes >= 0 and bytes_per_second > 0
    saved = float((_busiest(loads_now, current) - _busiest(loads_now, target)).sum())
    gain = saved * pair_seconds / window_seconds
    cost_s = num_bytes / bytes_per_second
    return Payback(gain, num_bytes, cost_s, cost_s / gain if gain > 0 else math.inf, horizon_s)


def _experts(placement: Placement) -> BoolArray:
    """bool [L, S, E]: which experts each shard holds."""
    held = np.zeros((placement.num_moe_layers, placement.num_shards, placement.num_experts), dtype=np.bool_)
    layer_pos, shard, slot = np.nonzero(placement.slots != EMPTY)
    held[layer_pos, shard, placement.slots[layer_pos, shard, slot]] = True
    return held


def _check(
    current: Placement,
    held: BoolArray,
    wanted: BoolArray,
    node_of_shard: Sequence[str] | None,
    lost: Collection[int],
) -> None:
    if held.shape != wanted.shape:
        raise PlacementError(
            f"migration: target has {wanted.shape} [layers, shards, experts], expected {held.shape} as the running "
            "placement"
        )
    num_shards, num_slots = current.num_shards, current.slots_per_shard
    if node_of_shard is not None and len(node_of_shard) != num_shards:
        raise PlacementError(f"migration: nodes of {len(node_of_shard)} shards given, expected {num_shards}")
    outside = [shard for shard in lost if not 0 <= shard < num_shards]
    if outside:
        raise PlacementError(f"migration: lost shard is {outside[0]}, expected 0 to {num_shards - 1}")
    sizes = wanted.sum(axis=2)
    if sizes.max() > num_slots:
        layer_pos, shard = np.unravel_index(int(sizes.argmax()), sizes.shape)
        raise PlacementError(
            f"migration: target has {sizes.max()} experts on shard {shard} in MoE layer {layer_pos}, which has "
            f"{num_slots} slots; {sizes.max() - num_slots} more spare slots per shard are needed"
        )
    unreachable = np.argwhere((wanted & ~held)[:, sorted(lost)])
    if len(unreachable):
        layer_pos, which, expert = unreachable[0].tolist()
        raise PlacementError(
            f"migration: target moves expert {expert} of MoE layer {layer_pos} to shard {sorted(lost)[which]}, but "
            "that shard is lost"
        )


def _apply(slots: Int32Array, layer_pos: int, step: LayerStep) -> list[Transfer]:
    """Changes slots [S, P] of a layer; what lands goes into the first slots that were EMPTY before. No sources yet."""
    rows = slots.tolist()
    empty = [[slot for slot, expert in enumerate(row) if expert == EMPTY] for row in rows]
    transfers = []
    for expert, shard in step.landings:
        slot = empty[shard].pop(0)
        rows[shard][slot] = expert
        transfers.append(Transfer(layer_pos, expert, shard, slot, DISK, DISK))
    for expert, shard in step.departures:
        rows[shard][rows[shard].index(expert)] = EMPTY
    slots[:] = rows
    return transfers


def _with_sources(
    landings: Sequence[Transfer],
    placement: Placement,
    node_of_shard: Sequence[str] | None,
    lost: Collection[int],
) -> tuple[Transfer, ...]:
    """Gives each landing a slot of `placement` to come from; in order of layer, shard and slot."""
    lookup = placement.lookup()
    layer_pos = [landing.layer_pos for landing in landings]
    expert_idx = [landing.expert_idx for landing in landings]
    shards = lookup.shard_idx[layer_pos, expert_idx].tolist()
    slots = lookup.slot_idx[layer_pos, expert_idx].tolist()
    options: list[tuple[Transfer, dict[int, int]]] = []
    for landing, at, slot_at in zip(landings, shards, slots, strict=True):
        holders = {shard: slot for shard, slot in zip(at, slot_at, strict=True) if shard != EMPTY and shard not in lost}
        if node_of_shard is not None:
            node = node_of_shard[landing.to_shard]
            holders = {shard: slot for shard, slot in holders.items() if node_of_shard[shard] == node} or holders
        options.append((landing, holders))
    options.sort(key=lambda option: len(option[1]))  # those without a choice first: the others level around them
    num_sent = [0] * placement.num_shards
    transfers = []
    for landing, holders in options:
        if holders:
            shard = min(holders, key=lambda holder: (num_sent[holder], holder))
            num_sent[shard] += 1
            landing = replace(landing, from_shard=shard, from_slot=holders[shard])
        transfers.append(landing)
    return tuple(sorted(transfers, key=lambda transfer: (transfer.layer_pos, transfer.to_shard, transfer.to_slot)))


def _busiest(loads: npt.ArrayLike, placement: Placement) -> npt.NDArray[np.float64]:
    """float64 [L]: pairs on the busiest shard of each layer."""
    pairs = np.asarray(loads, dtype=np.float64)
    expected = (placement.num_moe_layers, placement.num_experts)
    if pairs.shape != expected:
        raise PlacementError(f"payback: loads have shape {pairs.shape}, expected {expected} [layers, experts]")
    per_replica = pairs / placement.lookup().num_replicas
    return np.einsum("lse,le->ls", _experts(placement), per_replica).max(axis=1)


def _time(seconds: float) -> str:
    size = abs(seconds)
    if size >= 120:
        return f"{seconds / 60:.1f} min" if size < 7200 else f"{seconds / 3600:.1f} h"
    if size >= 1 or size == 0:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if size >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _size(num_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes} B"

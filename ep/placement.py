"""Which logical expert each slot of each shard holds. Pure: no I/O.

Shape legend: L MoE layers, S shards, P slots per shard and layer, E logical experts per layer, R replicas.
The layer axis is the position among the MoE layers (`ModelSpec.layer_pos`), not the checkpoint's layer number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ep.errors import PlacementError

EMPTY = -1
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ExpertLookup:
    """Where each logical expert of a placement lies.

    shard_idx, slot_idx: int32 [L, E, R], R the largest number of replicas of any expert. An expert's replicas are
    sorted by shard, then slot; entries past its own number of replicas are EMPTY.
    num_replicas: int32 [L, E].
    """

    shard_idx: Int32Array
    slot_idx: Int32Array
    num_replicas: Int32Array


@dataclass(frozen=True, eq=False)
class Placement:
    """One generation of the experts' whereabouts; immutable.

    slots: int32 [L, S, P], the logical expert in each slot or EMPTY. Every expert 0..num_experts-1 has at least one
    slot in every layer. A shard may not hold one expert of a layer twice. Raises PlacementError.
    """

    generation: int
    num_experts: int
    slots: Int32Array

    def __post_init__(self) -> None:
        slots = np.array(self.slots, dtype=np.int32)
        slots.setflags(write=False)
        object.__setattr__(self, "slots", slots)
        if self.generation < 0:
            raise PlacementError(f"placement: generation is {self.generation}, expected at least 0")
        if slots.ndim != 3 or 0 in slots.shape:
            raise PlacementError(
                f"placement: slots have shape {slots.shape}, expected [layers, shards, slots per shard]"
            )
        low, high = int(slots.min()), int(slots.max())
        if low < EMPTY or high >= self.num_experts:
            value = low if low < EMPTY else high
            raise PlacementError(f"placement: a slot holds expert {value}, expected {EMPTY} to {self.num_experts - 1}")
        counts = self._shard_counts
        if counts.max() > 1:
            layer, shard, expert = (int(axis[0]) for axis in np.nonzero(counts > 1))
            raise PlacementError(f"placement: shard {shard} holds expert {expert} of MoE layer {layer} more than once")
        missing = np.argwhere(counts.sum(axis=1) == 0)
        if len(missing):
            layer, expert = missing[0]
            raise PlacementError(
                f"placement: expert {expert} of MoE layer {layer} is in no slot ({len(missing)} such experts in all)"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return (
            (self.generation, self.num_experts) == (other.generation, other.num_experts)
            and self.slots.shape == other.slots.shape
            and bool(np.array_equal(self.slots, other.slots))
        )

    def __hash__(self) -> int:
        return hash((self.generation, self.num_experts, self.slots.tobytes()))

    @property
    def num_moe_layers(self) -> int:
        return self.slots.shape[0]

    @property
    def num_shards(self) -> int:
        return self.slots.shape[1]

    @property
    def slots_per_shard(self) -> int:
        return self.slots.shape[2]

    @cached_property
    def _shard_counts(self) -> npt.NDArray[np.int64]:
        """int64 [L, S, E]: how many slots of a shard hold an expert."""
        counts = np.zeros((self.num_moe_layers, self.num_shards, self.num_experts), dtype=np.int64)
        layer, shard, slot = np.nonzero(self.slots != EMPTY)
        np.add.at(counts, (layer, shard, self.slots[layer, shard, slot]), 1)
        return counts

    def lookup(self) -> ExpertLookup:
        """The inverse of `slots`: shard and slot of every replica of every logical expert."""
        return self._lookup

    @cached_property
    def _lookup(self) -> ExpertLookup:
        num_replicas = self._shard_counts.sum(axis=1).astype(np.int32)
        shape = (self.num_moe_layers, self.num_experts, int(num_replicas.max()))
        shard_idx = np.full(shape, EMPTY, dtype=np.int32)
        slot_idx = np.full(shape, EMPTY, dtype=np.int32)
        layer, shard, slot = np.nonzero(self.slots != EMPTY)
        expert = self.slots[layer, shard, slot]
        order = np.lexsort((slot, shard, expert, layer))
        layer, shard, slot, expert = layer[order], shard[order], slot[order], expert[order]
        first = np.cumsum(num_replicas.ravel()) - num_replicas.ravel()
        replica = np.arange(len(order)) - first[layer * self.num_experts + expert]
        shard_idx[layer, expert, replica] = shard
        slot_idx[layer, expert, replica] = slot
        for array in (shard_idx, slot_idx, num_replicas):
            array.setflags(write=False)
        return ExpertLookup(shard_idx, slot_idx, num_replicas)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for msgpack."""
        return {
            "generation": self.generation,
            "num_experts": self.num_experts,
            "shape": list(self.slots.shape),
            "slots": self.slots.astype("<i4").tobytes(),
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Placement:
        """The inverse of `to_dict`. Raises PlacementError."""
        try:
            slots = np.frombuffer(table["slots"], dtype="<i4").reshape(table["shape"])
            return cls(int(table["generation"]), int(table["num_experts"]), slots)
        except (KeyError, TypeError, ValueError) as error:
            raise PlacementError(f"placement: not a placement: {type(error).__name__}: {error}") from error


def even_split(num_moe_layers: int, num_experts: int, num_shards: int, generation: int = 0) -> Placement:
    """One slot for each expert, contiguous blocks of experts to each shard, the same in every layer.

    Where num_shards does not divide num_experts, the first shards hold one expert more and the last slot of the others
    is EMPTY. Raises PlacementError for fewer than one shard and for more shards than experts.
    """
    if not 1 <= num_shards <= num_experts:
        raise PlacementError(f"shards is {num_shards}, expected 1 to {num_experts}, the number of experts of a layer")
    slots = np.full((num_shards, -(-num_experts // num_shards)), EMPTY, dtype=np.int32)
    for shard_idx, block in enumerate(np.array_split(np.arange(num_experts), num_shards)):
        slots[shard_idx, : len(block)] = block
    return Placement(generation, num_experts, np.broadcast_to(slots, (num_moe_layers, *slots.shape)))


def with_spares(placement: Placement, num_spares: int) -> Placement:
    """The same with num_spares more slots on every shard and layer, EMPTY: what a migration moves into.

    Raises PlacementError for a negative number.
    """
    if num_spares < 0:
        raise PlacementError(f"spares is {num_spares}, expected at least 0")
    padding = ((0, 0), (0, 0), (0, num_spares))
    slots = np.pad(placement.slots, padding, constant_values=EMPTY)
    return Placement(placement.generation, placement.num_experts, slots)


def without_spares(placement: Placement) -> Placement:
    """The same experts on every shard, in as few slots as hold them: the form that plans are made in."""
    order = np.argsort(placement.slots == EMPTY, axis=2, kind="stable")
    slots = np.take_along_axis(placement.slots, order, axis=2)
    most = int((slots != EMPTY).sum(axis=2).max())
    return Placement(placement.generation, placement.num_experts, slots[:, :, :most])

"""Which losses of shards or nodes leave a copy of every expert.

Shape legend: U units (shards or nodes), H sets of units that hold some expert, C combinations of lost units.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ep.errors import PlacementError
from ep.placement import EMPTY, Placement

BoolArray = npt.NDArray[np.bool_]

MAX_LOST = 4
EXACT_UP_TO = 20_000
"""Combinations that are all looked at; of more, so many are drawn."""
GB = 1e9


@dataclass(frozen=True)
class Losses:
    """num_lost units at once. survived: the share of their combinations that leave a copy of every expert. exact: all
    were looked at; else a sample. per_gb: survived by gigabytes of redundant memory in all, None without any."""

    num_lost: int
    survived: float
    exact: bool
    per_gb: float | None


@dataclass(frozen=True)
class Tolerance:
    """unit: "shard" or "node". fatal: the smallest number of them whose loss can lose an expert; every combination of
    fewer is survived. losses: for 1, 2, ... units, fewer than there are."""

    unit: str
    num_units: int
    fatal: int
    losses: tuple[Losses, ...]


@dataclass(frozen=True)
class Survivability:
    """nodes: None where no nodes were given. redundant_bytes: weights of all slots beyond one for each expert."""

    shards: Tolerance
    nodes: Tolerance | None
    redundant_bytes: int


def survivability(
    placement: Placement,
    node_of_shard: tuple[int, ...] | None = None,
    bytes_per_expert: int = 0,
    max_lost: int = MAX_LOST,
    seed: int = 0,
) -> Survivability:
    """What a placement tolerates. bytes_per_expert: weights of one expert of one layer.

    Raises PlacementError if node_of_shard does not name every shard's node.
    """
    num_filled = int((placement.slots != EMPTY).sum())
    redundant = (num_filled - placement.num_moe_layers * placement.num_experts) * bytes_per_expert
    on_shard = _holders(placement, tuple(range(placement.num_shards)))
    shards = _tolerance("shard", on_shard, redundant, max_lost, seed)
    nodes = None
    if node_of_shard is not None:
        if len(node_of_shard) != placement.num_shards:
            raise PlacementError(f"node_of_shard names {len(node_of_shard)} shards, expected {placement.num_shards}")
        nodes = _tolerance("node", _holders(placement, node_of_shard), redundant, max_lost, seed)
    return Survivability(shards, nodes, redundant)


def _holders(placement: Placement, unit_of_shard: tuple[int, ...]) -> BoolArray:
    """bool [H, U]: the different sets of units that hold the experts of all layers, without supersets of others."""
    units = np.unique(np.array(unit_of_shard), return_inverse=True)[1]
    held = np.zeros((placement.num_moe_layers, placement.num_experts, int(units.max()) + 1), dtype=bool)
    layer, shard, slot = np.nonzero(placement.slots != EMPTY)
    held[layer, placement.slots[layer, shard, slot], units[shard]] = True
    sets = np.unique(held.reshape(-1, held.shape[2]), axis=0)
    sets = sets[np.argsort(sets.sum(axis=1), kind="stable")]
    # A loss of all of a set's holders is one of each of its subsets' as well: the least sets decide.
    least: list[npt.NDArray[np.bool_]] = []
    singles = sets[sets.sum(axis=1) == 1].any(axis=0)
    for units_of in sets:
        if units_of.sum() == 1 or not ((units_of & singles).any() or any((other <= units_of).all() for other in least)):
            least.append(units_of)
    return np.stack(least)


def _tolerance(unit: str, sets: BoolArray, redundant_bytes: int, max_lost: int, seed: int) -> Tolerance:
    num_units = sets.shape[1]
    sizes = sets.sum(axis=1)
    losses = []
    for num_lost in range(1, min(max_lost, num_units - 1) + 1):
        exact = math.comb(num_units, num_lost) <= EXACT_UP_TO
        if exact:
            lost = np.array(list(itertools.combinations(range(num_units), num_lost)))
        else:
            drawn = np.random.default_rng((seed, num_lost)).random((EXACT_UP_TO, num_units))
            lost = np.argpartition(drawn, num_lost, axis=1)[:, :num_lost]
        gone = np.zeros((len(lost), num_units), dtype=np.float32)
        np.put_along_axis(gone, lost, 1.0, axis=1)
        # float32 products count exactly up to 2**24 units
        ended = np.zeros(len(lost), dtype=bool)
        for start in range(0, len(sets), 1024):
            part = slice(start, start + 1024)
            ended |= (gone @ sets[part].T.astype(np.float32) == sizes[part]).any(axis=1)
        survived = float(1 - ended.mean())
        per_gb = survived / (redundant_bytes / GB) if redundant_bytes else None
        losses.append(Losses(num_lost, survived, exact, per_gb))
    return Tolerance(unit, num_units, int(sizes.min()), tuple(losses))

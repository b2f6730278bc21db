"""Expert loads and a request -> a placement, how even it is, and how even any could be.

Shape legend: L MoE layers, S shards, P slots per shard, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ep.errors import PlacementError
from ep.placement import EMPTY, Placement
from ep.planning.bound import lower_bound, simple_bound
from ep.planning.imbalance import Imbalance, imbalance
from ep.planning.packing import from_slots
from ep.planning.request import PlanRequest
from ep.planning.solve import GOOD, RETRY, solve, solve_hierarchical
from ep.planning.stay import grow_from, keep_order, num_moves, relabel
from ep.planning.waterfill import busiest_when_split_at_will

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """A placement and what it is worth for `loads`, float64 [L, E].

    shard_load: float64 [L, S], every expert's load split equally over its replicas. lower_bound: float64 [L], what no
    placement's busiest shard can be below under that split, whatever its policy. moves: int64 [L], experts that shards
    have to get because the previous placement does not give it to them; zero without one.
    """

    placement: Placement
    loads: Float64Array
    shard_load: Float64Array
    lower_bound: Float64Array
    moves: Int64Array

    @property
    def imbalance(self) -> Imbalance:
        """By layer."""
        return imbalance(self.shard_load)

    @property
    def gap(self) -> Float64Array:
        """float64 [L]: how far the busiest shard is above the bound, relatively; the best plan may be there too."""
        bound = np.where(self.lower_bound > 0, self.lower_bound, 1.0)
        return np.maximum(self.shard_load.max(axis=1) / bound - 1, 0.0) * (self.lower_bound > 0)

    @cached_property
    def split_at_will(self) -> Float64Array:
        """float64 [L]: the busiest shard's load if the router splits every expert's over its replicas at best."""
        return busiest_when_split_at_will(self.placement, self.loads)


def plan(loads: npt.ArrayLike, request: PlanRequest) -> Plan:
    """The placement for loads [L, E], the tokens (or any measure of work) of each logical expert of each MoE layer.

    Layers without any load are planned as evenly loaded ones. Deterministic. Raises PlacementError for loads that are
    none and for requests that no placement satisfies.
    """
    loads = checked_loads(loads)
    num_layers, num_experts = loads.shape
    request.check(num_layers, num_experts)
    # In single precision, as the published algorithm takes loads, so that its ties are ours.
    planned = np.where(loads.any(axis=1, keepdims=True), loads, 1.0).astype(np.float32).astype(np.float64)
    if request.hierarchical:
        slots = solve_hierarchical(planned, request)
    else:
        slots = solve(planned, request.num_shards, request.num_redundant, _domains(request)).slots
    moves = np.zeros(num_layers, dtype=np.int64)
    if request.previous is not None:
        previous = _filled(request.previous)
        slots = _stay(slots, previous, planned, request)
        moves = num_moves(slots, previous, num_experts)
    else:
        slots = np.sort(slots, axis=2)  # empty slots last
    named = np.where(slots == num_experts, EMPTY, slots).astype(np.int32)
    placement = Placement(request.generation, num_experts, named)
    load = shard_load(placement, loads)
    return Plan(placement, loads, load, _bound(loads, load, request), moves)


def shard_load(placement: Placement, loads: npt.ArrayLike) -> Float64Array:
    """float64 [L, S]: the load of each shard if loads [L, E] are split equally over replicas. Raises PlacementError."""
    loads = checked_loads(loads)
    shape = (placement.num_moe_layers, placement.num_experts)
    if loads.shape != shape:
        raise PlacementError(f"loads have shape {loads.shape}, expected {shape}, the placement's layers and experts")
    size = np.concatenate([loads / placement.lookup().num_replicas, np.zeros((len(loads), 1))], axis=1)
    return np.take_along_axis(size[:, None], _filled(placement), axis=2).sum(axis=2)


def checked_loads(loads: npt.ArrayLike) -> Float64Array:
    """loads as float64 [L, E]. Raises PlacementError for other shapes and for values that are no loads."""
    array = np.array(loads, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise PlacementError(f"loads have shape {array.shape}, expected [MoE layers, experts]")
    with np.errstate(over="ignore"):
        wrong = np.argwhere(~(np.isfinite(array.astype(np.float32)) & (array >= 0)))
    if len(wrong):
        layer, expert = wrong[0]
        raise PlacementError(
            f"loads: expert {expert} of MoE layer {layer} has {array[layer, expert]:g}, expected a number from 0 up"
        )
    return array


def _domains(request: PlanRequest) -> Int64Array | None:
    return request.nodes if request.separate_domains and request.nodes.any() else None


def _filled(placement: Placement) -> Int64Array:
    """Slots with the number of experts in place of EMPTY."""
    return np.where(placement.slots == EMPTY, placement.num_experts, placement.slots).astype(np.int64)


def _counts(slots: Int64Array, num_experts: int) -> Int64Array:
    """int64 [L, E]"""
    return (slots.reshape(len(slots), -1, 1) == np.arange(num_experts)).sum(axis=1)


def _stay(slots: Int64Array, previous: Int64Array, loads: Float64Array, request: PlanRequest) -> Int64Array:
    """Slots as good as these, near the previous ones."""
    num_experts = loads.shape[1]
    keep_nodes = request.hierarchical or request.separate_domains
    nodes = request.nodes if keep_nodes else np.zeros(request.num_shards, dtype=np.int64)
    busiest = from_slots(slots, loads, _counts(slots, num_experts)).busiest
    renamed = relabel(slots, previous, num_experts, nodes)
    if not request.hierarchical and previous.shape == slots.shape:
        good_enough = simple_bound(loads, request.num_shards, request.num_redundant) * (1 + GOOD)
        target = np.maximum(busiest, good_enough) * (1 + request.slack)
        for counts in (_counts(previous, num_experts), _counts(slots, num_experts)):
            found, layers = grow_from(previous, loads, counts, target, request.num_shards, _domains(request))
            moves = num_moves(found.slots, previous[layers], num_experts)
            fewer = moves < num_moves(renamed[layers], previous[layers], num_experts)
            renamed[layers[fewer]] = found.slots[fewer]
    return keep_order(renamed, previous, num_experts)


def _bound(loads: Float64Array, load: Float64Array, request: PlanRequest) -> Float64Array:
    """float64 [L]: the simple bound where it shows that the plan is good, the better one elsewhere."""
    bound = simple_bound(loads, request.num_shards, request.num_redundant)
    busiest = load.max(axis=1)
    open_layers = np.flatnonzero(busiest > bound * (1 + RETRY))
    if len(open_layers):
        bound[open_layers] = lower_bound(
            loads[open_layers], request.num_shards, request.num_redundant, busiest[open_layers]
        )
    # Adding the same loads up in another order may put a sum above its own bound by rounding.
    return np.minimum(bound, busiest)

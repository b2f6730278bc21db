"""How good a trace's placements are, beside a plan for the same slots and beside what any plan could reach. Pure.

Shape legend: L MoE layers, S shards, E logical experts. Measures are means over layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ep.errors import PlacementError
from ep.load import Int64Array
from ep.placement import EMPTY, Placement
from ep.planning.imbalance import imbalance
from ep.planning.plan import Plan, plan, shard_load
from ep.planning.request import PlanRequest
from ep.trace import Trace

Float64Array = npt.NDArray[np.float64]
SLACK = 0.05
FIRST, CURRENT, PLANNED, BY_NODE = "first", "current", "plan", "plan by node"
FEWER_MOVES = f"plan within {SLACK:.0%}"


@dataclass(frozen=True)
class PlacementNumbers:
    """A placement, judged on the load of the whole trace.

    over_bound: by how much its busiest shards are above the least that any placement with as many slots could have
    (0.02: 2%). moves: (layer, expert) that shards have to get because the current placement does not give it to them.
    """

    name: str
    generation: int
    num_redundant: int
    excess: float
    evenness: float
    over_bound: float
    moves: int
    moved_bytes: int


@dataclass(frozen=True)
class Bounds:
    """excess, evenness: better than these no placement with as many slots gets under an equal split over replicas.
    at_will_excess, at_will_evenness: of the plan, if tokens were split over replicas in the best way (an LP)."""

    excess: float
    evenness: float
    at_will_excess: float
    at_will_evenness: float


@dataclass(frozen=True, eq=False)
class PlanNumbers:
    """placements: as recorded (first, current), the plan, and two others. Within 5%: the busiest shards may have so
    much more than in the plan where that saves moves. By node: with the experts of a group on one node, where groups
    are a limit and there are nodes for them. current_load, planned_load: float64 [L, S]."""

    num_redundant: int
    placements: tuple[PlacementNumbers, ...]
    bounds: Bounds
    current_load: Float64Array
    planned_load: Float64Array
    current: Placement = field(repr=False)
    planned: Placement = field(repr=False)


def plan_numbers(trace: Trace, counts: Int64Array) -> PlanNumbers:
    """counts: int64 [L, E], the trace's totals."""
    current = trace.current
    request = PlanRequest(
        current.num_shards, num_redundant(current), generation=current.generation + 1, previous=current
    )
    best = plan(counts, request)
    placements = {FIRST: trace.header.placement, CURRENT: current, PLANNED: best.placement}
    placements[FEWER_MOVES] = plan(counts, replace(request, slack=SLACK)).placement
    spec = trace.header.spec
    by_node = replace(
        request, node_of_shard=nodes_of_shards(trace), num_groups=spec.num_groups, topk_groups=spec.topk_groups
    )
    if by_node.hierarchical and (found := attempt(counts, by_node)):
        placements[BY_NODE] = found.placement
    mean = counts.sum(axis=1) / current.num_shards
    return PlanNumbers(
        num_redundant=request.num_redundant,
        placements=tuple(
            _placement(name, placement, current, counts, best.lower_bound, spec.expert_bytes)
            for name, placement in placements.items()
            if name != FIRST or trace.changes
        ),
        bounds=Bounds(*_of_busiest(best.lower_bound, mean), *_of_busiest(best.split_at_will, mean)),
        current_load=shard_load(current, counts),
        planned_load=best.shard_load,
        current=current,
        planned=best.placement,
    )


def num_redundant(placement: Placement) -> int:
    """Filled slots of a layer beyond one for each expert, in the layer with the most."""
    return int((placement.slots != EMPTY).sum(axis=(1, 2)).max()) - placement.num_experts


def _placement(
    name: str, placement: Placement, current: Placement, counts: Int64Array, bound: Float64Array, expert_bytes: int
) -> PlacementNumbers:
    load = shard_load(placement, counts)
    even, least = imbalance(load), np.where(bound > 0, bound, 1.0)
    moves = int((_held(placement) & ~_held(current)).sum())
    return PlacementNumbers(
        name=name,
        generation=placement.generation,
        num_redundant=num_redundant(placement),
        excess=float(even.excess.mean()),
        evenness=float(even.evenness.mean()),
        over_bound=float(np.maximum(load.max(axis=1) / least - 1, 0.0)[bound > 0].mean()),
        moves=moves,
        moved_bytes=moves * expert_bytes,
    )


def _held(placement: Placement) -> npt.NDArray[np.bool_]:
    """bool [L, S, E]: whether a shard holds an expert."""
    held = np.zeros((placement.num_moe_layers, placement.num_shards, placement.num_experts), dtype=bool)
    layer, shard, slot = np.nonzero(placement.slots != EMPTY)
    held[layer, shard, placement.slots[layer, shard, slot]] = True
    return held


def _of_busiest(busiest: Float64Array, mean: Float64Array) -> tuple[float, float]:
    """Both measures from the busiest and the mean shard's load, [L] each."""
    loaded = mean > 0
    ratio = np.maximum(busiest[loaded] / mean[loaded], 1.0)
    # A layer without load counts as even, as everywhere.
    idle = np.ones(int((~loaded).sum()))
    ratio = np.concatenate([ratio, idle])
    return float(ratio.mean() - 1), float((1 / ratio).mean())


def attempt(loads: npt.ArrayLike, request: PlanRequest) -> Plan | None:
    """None where the request cannot be met with these shards."""
    try:
        return plan(loads, request)
    except PlacementError:
        return None


def nodes_of_shards(trace: Trace) -> tuple[int, ...]:
    """The node of each shard, numbered."""
    names = sorted(set(trace.header.node_of_shard))
    return tuple(names.index(node) for node in trace.header.node_of_shard)

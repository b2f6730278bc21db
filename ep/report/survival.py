"""Which losses of shards and nodes the recorded placement and better ones survive, and at what cost in memory. Pure.

Shape legend: L MoE layers, S shards, E logical experts, R replicas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ep.load import Int64Array
from ep.placement import EMPTY, Placement
from ep.planning.request import PlanRequest
from ep.planning.survivability import Losses, survivability
from ep.report.plans import CURRENT, PLANNED, attempt, nodes_of_shards, num_redundant
from ep.trace import Trace

APART, TWICE = "plan apart", "every expert twice"


@dataclass(frozen=True)
class SurvivalNumbers:
    """unit: what is lost, shard or node. tolerated: losses of which every combination is survived. single: share of
    experts that lie on one unit only. losses: by the number of units lost."""

    name: str
    unit: str
    num_redundant: int
    redundant_bytes: int
    single: float
    tolerated: int
    losses: tuple[Losses, ...]


def survival_numbers(trace: Trace, counts: Int64Array, planned: Placement, seed: int) -> tuple[SurvivalNumbers, ...]:
    """The current placement, the plan, the plan with replicas on different nodes, and every expert twice that way,
    whatever its load.

    counts: int64 [L, E], the trace's totals. seed: of sampled combinations.
    """
    current, nodes = trace.current, nodes_of_shards(trace)
    spread = PlanRequest(
        current.num_shards,
        num_redundant(current),
        node_of_shard=nodes,
        separate_domains=True,
        generation=current.generation + 1,
        previous=current,
    )
    placements = {CURRENT: current, PLANNED: planned}
    if spread.num_redundant and max(nodes) > 0 and (found := attempt(counts, spread)):
        placements[APART] = found.placement
    # Even loads and as many redundant slots as experts: two replicas of each.
    twice = replace(spread, num_redundant=current.num_experts, previous=None)
    if current.num_shards > 1 and (found := attempt(np.ones(counts.shape), twice)):
        placements[TWICE] = found.placement
    shards = tuple(range(current.num_shards))
    numbers = []
    for name, placement in placements.items():
        survived = survivability(placement, nodes, trace.header.spec.expert_bytes, seed=seed)
        for tolerance in (survived.shards, survived.nodes):
            if tolerance is not None and tolerance.num_units > 1:
                numbers.append(
                    SurvivalNumbers(
                        name=name,
                        unit=tolerance.unit,
                        num_redundant=num_redundant(placement),
                        redundant_bytes=survived.redundant_bytes,
                        single=single_homed(placement, nodes if tolerance.unit == "node" else shards),
                        tolerated=tolerance.fatal - 1,
                        losses=tolerance.losses,
                    )
                )
    return tuple(numbers)


def single_homed(placement: Placement, unit_of_shard: tuple[int, ...]) -> float:
    """Share of the experts of all layers whose replicas all lie on one unit, and are lost with it."""
    shard_idx = placement.lookup().shard_idx
    unit = np.array(unit_of_shard)[shard_idx]
    elsewhere = (unit != unit[..., :1]) & (shard_idx != EMPTY)
    return float((~elsewhere.any(axis=2)).mean())

"""Which GPUs a router and its shards take, and how many slots a shard has: what `ep serve` would start."""

from __future__ import annotations

from dataclasses import dataclass

from ep.errors import PlacementError
from ep.model import ModelSpec
from ep.planning.request import PlanRequest

SLOTS_PER_SPARE = 16


@dataclass(frozen=True)
class Layout:
    """One router GPU and a GPU for every shard.

    experts_per_shard: slots that hold experts, in the fullest shard; slots_per_shard with the empty ones for moves.
    beside_router: shards that must share the router's GPU because there are too few GPUs.
    """

    nodes: int
    gpus_per_node: int
    shards: int
    experts_per_shard: int
    slots_per_shard: int
    redundant: int
    beside_router: int
    why: str

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def gpus_needed(self) -> int:
        return self.shards + 1


def plan_layout(
    spec: ModelSpec, nodes: int, gpus_per_node: int, shards: int, redundant: int = 0, spare_slots: int | None = None
) -> Layout:
    """spare_slots: per shard and layer, None for ep serve's one for every 16. Raises PlacementError."""
    if shards > spec.num_experts:
        raise PlacementError(
            f"--shards {shards}: the model has {spec.num_experts} experts a layer, "
            f"expected 1 to {spec.num_experts} shards"
        )
    PlanRequest(shards, redundant).check(spec.num_moe_layers, spec.num_experts)
    experts = -(-(spec.num_experts + redundant) // shards)
    spare = -(-experts // SLOTS_PER_SPARE) if spare_slots is None else spare_slots
    gpus = nodes * gpus_per_node
    missing = shards + 1 - gpus
    beside = 0 if missing <= 0 else -(-shards // gpus)
    return Layout(nodes, gpus_per_node, shards, experts, experts + spare, redundant, beside, _why(nodes, gpus, shards))


def _why(nodes: int, gpus: int, shards: int) -> str:
    missing = shards + 1 - gpus
    where = f"{nodes} node{'s' if nodes > 1 else ''} with {gpus} GPUs"
    if missing <= 0:
        return f"a GPU for the router and one for each of {shards} shards: {shards + 1} of the {gpus} on {where}"
    per_node = gpus // nodes
    more = -(-(shards + 1) // per_node)
    share = "a shard shares the router's GPU" if missing == 1 else "several actors share a GPU"
    have = "has" if nodes == 1 else "have"
    return (
        f"1 router + {shards} shards need {shards + 1} GPUs, "
        f"{where} {have} {missing} too few: {share}, or use {gpus - 1} shards or {more} nodes"
    )

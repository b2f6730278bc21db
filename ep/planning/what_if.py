"""How even other numbers of shards and redundant slots would be for the same loads, and what they would cost.

Shape legend: L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy.typing as npt

from ep.errors import PlacementError
from ep.planning.plan import checked_loads, plan
from ep.planning.request import PlanRequest

SHARDS = (8, 16, 32, 64, 128, 256)
REDUNDANTS = (0, 8, 16, 32, 64)


@dataclass(frozen=True)
class WhatIf:
    """One number of shards and of redundant slots per layer. slots_per_shard: per layer, of the fullest shard.

    excess, evenness, gap: means over layers, as in `Imbalance` and `Plan.gap`. extra_bytes_per_shard: all layers'
    weights on the fullest shard beyond those that it has without redundant slots.
    """

    num_shards: int
    num_redundant: int
    slots_per_shard: int
    excess: float
    evenness: float
    gap: float
    extra_bytes_per_shard: int


def what_if(
    loads: npt.ArrayLike,
    bytes_per_expert: int,
    shards: Sequence[int] = SHARDS,
    redundants: Sequence[int] = REDUNDANTS,
) -> tuple[WhatIf, ...]:
    """A global plan for each pair that can exist, by shards, then redundant slots, for loads [L, E].

    bytes_per_expert: weights of one expert of one layer. Raises PlacementError for loads that are none, and for numbers
    of shards or redundant slots that no model has.
    """
    loads = checked_loads(loads)
    num_layers, num_experts = loads.shape
    rows = []
    for num_shards in shards:
        for num_redundant in redundants:
            request = PlanRequest(num_shards, num_redundant)
            try:
                request.check(num_layers, num_experts)
            except PlacementError:
                continue
            result = plan(loads, request)
            imbalance = result.imbalance
            slots = result.placement.slots_per_shard
            extra = slots - -(-num_experts // num_shards)
            rows.append(
                WhatIf(
                    num_shards=num_shards,
                    num_redundant=num_redundant,
                    slots_per_shard=slots,
                    excess=float(imbalance.excess.mean()),
                    evenness=float(imbalance.evenness.mean()),
                    gap=float(result.gap.mean()),
                    extra_bytes_per_shard=extra * num_layers * bytes_per_expert,
                )
            )
    return tuple(rows)

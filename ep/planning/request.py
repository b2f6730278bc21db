"""What a placement is planned for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ep.errors import PlacementError
from ep.placement import Placement

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PlanRequest:
    """num_redundant: slots of a layer beyond one for each expert; shards differ by at most one slot.

    node_of_shard: the node of each shard; None is all on one node.
    num_groups, topk_groups: the model's expert groups and how many of them a token may choose from. Where that is a
        limit, and there are as many groups (or a multiple) as nodes, of equal size, the experts of a group stay on one
        node: the published "hierarchical" policy. Everything else is planned globally.
    separate_domains: replicas of an expert on as many nodes as there are; not with the hierarchical policy. Kept to
        where nodes have equally many shards; elsewhere as far as the search gets.
    previous: the placement in use; of plans as good as each other the one is chosen that changes few slots of it.
    slack: how much higher, relatively, the busiest shard's load may be if that leaves more slots as they are.
    """

    num_shards: int
    num_redundant: int = 0
    node_of_shard: tuple[int, ...] | None = None
    num_groups: int = 1
    topk_groups: int = 1
    separate_domains: bool = False
    generation: int = 0
    previous: Placement | None = None
    slack: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("num_shards", 1), ("num_redundant", 0), ("num_groups", 1), ("topk_groups", 1)):
            if getattr(self, name) < least:
                raise PlacementError(f"plan: {name} is {getattr(self, name)}, expected at least {least}")
        if self.topk_groups > self.num_groups:
            raise PlacementError(
                f"plan: topk_groups is {self.topk_groups}, expected at most {self.num_groups}, num_groups"
            )
        if self.slack < 0:
            raise PlacementError(f"plan: slack is {self.slack:g}, expected at least 0")
        if self.node_of_shard is not None and len(self.node_of_shard) != self.num_shards:
            raise PlacementError(
                f"plan: node_of_shard names {len(self.node_of_shard)} shards, expected {self.num_shards}, num_shards"
            )
        if self.separate_domains and self.node_of_shard is None:
            raise PlacementError("plan: separate_domains is set, expected node_of_shard with it")
        if self.separate_domains and self.hierarchical:
            raise PlacementError(
                f"plan: separate_domains is set, expected no group limit with it: {self.num_groups} groups, "
                f"{self.topk_groups} of them for a token, stay on their nodes"
            )

    @property
    def nodes(self) -> Int64Array:
        """int64 [S]: nodes renumbered 0, 1, ..."""
        if self.node_of_shard is None:
            return np.zeros(self.num_shards, dtype=np.int64)
        return np.unique(np.array(self.node_of_shard), return_inverse=True)[1].astype(np.int64)

    @property
    def hierarchical(self) -> bool:
        """Whether the experts of a group stay on one node."""
        shards_of_node = np.bincount(self.nodes)
        return (
            len(shards_of_node) > 1
            and self.topk_groups < self.num_groups
            and self.num_groups % len(shards_of_node) == 0
            and bool((shards_of_node == shards_of_node[0]).all())
        )

    def check(self, num_moe_layers: int, num_experts: int) -> None:
        """Raises PlacementError where no placement of so many experts satisfies the request."""
        num_slots = num_experts + self.num_redundant
        if self.num_shards > num_slots:
            raise PlacementError(
                f"plan: num_shards is {self.num_shards}, expected at most {num_slots}: "
                f"{num_experts} experts and {self.num_redundant} redundant slots"
            )
        if self.hierarchical and num_experts % self.num_groups:
            raise PlacementError(f"plan: num_groups is {self.num_groups}, expected a divisor of {num_experts} experts")
        num_nodes = int(self.nodes.max()) + 1 if self.hierarchical else 1
        most = (self.num_shards // num_nodes - 1) * (num_experts // num_nodes)
        if -(-self.num_redundant // num_nodes) > most:
            raise PlacementError(
                f"plan: num_redundant is {self.num_redundant}, expected at most {most * num_nodes}: "
                f"{num_experts} experts, each at most once on every one of {self.num_shards // num_nodes} shards"
                + (" of its node" if num_nodes > 1 else "")
            )
        if self.previous is not None:
            have = (self.previous.num_moe_layers, self.previous.num_experts)
            if have != (num_moe_layers, num_experts):
                raise PlacementError(
                    f"plan: the previous placement has {have[0]} MoE layers of {have[1]} experts, "
                    f"expected {num_moe_layers} of {num_experts}"
                )

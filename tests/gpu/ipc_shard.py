"""What the shards of tests/gpu/test_ipc.py compute: a module that their processes can import."""

from __future__ import annotations

import torch

from ep.bench.ipc_shards import ShardSetup
from ep.kernels.p2p import Job


class ScaleExperts:
    """Expert e of layer l multiplies by (1 + e) * (2 + l); slots hold the experts of ep.placement.even_split."""

    def __init__(self, setup: ShardSetup, num_experts: int = 8) -> None:
        per_shard = num_experts // setup.num_shards
        first = setup.shard_idx * per_shard
        self._factors = torch.arange(first + 1, first + per_shard + 1, device=f"cuda:{setup.gpu}").float()

    def __call__(self, job: Job, capacity: int, out: torch.Tensor) -> None:
        slots = job.slot_ids[:capacity]
        factors = self._factors[slots.clamp(0, len(self._factors) - 1).long()] * (2 + job.layer_idx)
        total = torch.where(slots >= 0, factors * job.weights[:capacity], 0).sum(1, keepdim=True)
        values = job.rows[:capacity].float()
        if job.scales is not None:
            values = (values.unflatten(1, (-1, 128)) * job.scales[:capacity, :, None]).flatten(1)
        out.copy_(values * total)

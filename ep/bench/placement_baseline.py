"""vLLM's own placement policy, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
Policy = Callable[[Float64Array, int, int], Int64Array]


def vllm_policy() -> Policy | None:
    """A call of loads [L, E], shards and redundant slots, which shards must divide together with E, that returns
    slots [L, S, P]. None without vLLM."""
    if find_spec("vllm") is None:
        return None
    from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

    def call(loads: Float64Array, num_shards: int, num_redundant: int) -> Int64Array:
        policy: Any = DefaultEplbPolicy
        num_slots = loads.shape[1] + num_redundant
        slots = policy.rebalance_experts(torch.from_numpy(loads), num_slots, 1, 1, num_shards)
        placed: Int64Array = slots.numpy().reshape(len(loads), num_shards, -1)
        return placed

    return call

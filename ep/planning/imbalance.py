"""The two published measures of how uneven shards are.

Shape legend: L MoE layers, S shards; any leading axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Imbalance:
    """Of each layer, float64 [L]. Shards without any load count as even.

    excess: (max - mean) / mean, 0 when even, as TensorRT-LLM reports it. evenness: mean / max, 1 when even, the
    "balancedness" of SGLang and vLLM.
    """

    excess: Float64Array
    evenness: Float64Array


def imbalance(shard_load: npt.ArrayLike) -> Imbalance:
    """Loads [..., S] -> both measures [...]."""
    load = np.asarray(shard_load, dtype=np.float64)
    most, mean = load.max(axis=-1), load.mean(axis=-1)
    idle = most <= 0
    excess = (most - mean) / np.where(idle, 1.0, mean)
    evenness = np.where(idle, 1.0, mean / np.where(idle, 1.0, most))
    return Imbalance(excess, evenness)

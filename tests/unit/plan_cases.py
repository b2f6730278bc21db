"""Loads and requests that the tests of planning share, and an independent account of what shards carry."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from ep.placement import EMPTY, Placement
from ep.planning.request import PlanRequest

Float64Array = npt.NDArray[np.float64]

README_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
"""The example of github.com/deepseek-ai/EPLB: 16 replicas, 4 groups, 2 nodes, 8 GPUs."""


def zipf(num_layers: int, num_experts: int, exponent: float, seed: int) -> Float64Array:
    """Tokens of each expert [L, E], drawn around Zipf's law with another order of experts in each layer."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1.0, num_experts + 1) ** -exponent
    shares = np.stack([rng.permutation(weights) for _ in range(num_layers)]) / weights.sum()
    return rng.poisson(shares * 1000 * num_experts).astype(np.float64)


@st.composite
def loads(draw: st.DrawFn, most_experts: int = 12) -> Float64Array:
    """float64 [L, E], zeros and equal ones among them."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, most_experts))
    value = st.one_of(st.integers(0, 3), st.integers(0, 10**6))
    values = draw(st.lists(value, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return np.array(values, dtype=np.float64).reshape(shape)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Float64Array, PlanRequest]:
    """Loads and a request that has a placement: any number of shards, with and without nodes of any size."""
    table = draw(loads())
    num_experts = table.shape[1]
    num_shards = draw(st.integers(1, 8))
    least, most = max(num_shards - num_experts, 0), (num_shards - 1) * num_experts
    num_redundant = draw(st.integers(least, max(min(most, 20), least)))
    nodes = draw(st.one_of(st.none(), st.tuples(*[st.integers(0, 3)] * num_shards)))
    separate = nodes is not None and draw(st.booleans())
    return table, PlanRequest(num_shards, num_redundant, nodes, separate_domains=separate)


def carried(placement: Placement, table: Float64Array) -> list[list[float]]:
    """What each shard of each layer carries, counted slot by slot."""
    result = []
    for slots, row in zip(placement.slots.tolist(), table.tolist()):
        replicas = Counter(expert for shard in slots for expert in shard if expert != EMPTY)
        result.append([sum(row[expert] / replicas[expert] for expert in shard if expert != EMPTY) for shard in slots])
    return result

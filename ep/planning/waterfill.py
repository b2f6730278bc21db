"""The best that a router can do with a placement: the load of an expert split at will over its replicas.

Shape legend: L MoE layers, E logical experts, S shards.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import coo_array

from ep.placement import Placement

Float64Array = npt.NDArray[np.float64]


def busiest_when_split_at_will(placement: Placement, loads: Float64Array) -> Float64Array:
    """float64 [L]: the least load of the busiest shard over all fractional splits of loads [L, E].

    One linear program for all layers, solved by HiGHS: minimise sum_l T_l with x >= 0 of each replica of a replicated
    expert, their sum the expert's load, and every shard's fixed load plus its x at most T_l. Layers share no variable,
    so each T_l is least by itself.
    """
    lookup = placement.lookup()
    num_layers, num_shards = placement.num_moe_layers, placement.num_shards
    scale = np.where(loads.any(axis=1), loads.mean(axis=1), 1.0)
    single = lookup.num_replicas == 1
    fixed = np.zeros((num_layers, num_shards))
    layer, expert = np.nonzero(single)
    np.add.at(fixed, (layer, lookup.shard_idx[layer, expert, 0]), loads[layer, expert] / scale[layer])
    layer, expert, replica = np.nonzero((lookup.shard_idx >= 0) & ~single[:, :, None])
    if not len(layer):
        return fixed.max(axis=1) * scale
    num_splits = len(layer)
    split_expert, of_expert = np.unique(layer * placement.num_experts + expert, return_inverse=True)
    shard_row = layer * num_shards + lookup.shard_idx[layer, expert, replica]
    # Columns: every x, then every T.
    rows = np.concatenate([shard_row, np.arange(num_layers * num_shards)])
    columns = np.concatenate([np.arange(num_splits), num_splits + np.repeat(np.arange(num_layers), num_shards)])
    values = np.concatenate([np.ones(num_splits), -np.ones(num_layers * num_shards)])
    num_columns = num_splits + num_layers
    at_most = coo_array((values, (rows, columns)), shape=(num_layers * num_shards, num_columns)).tocsr()
    whole = coo_array(
        (np.ones(num_splits), (of_expert, np.arange(num_splits))), shape=(len(split_expert), num_columns)
    ).tocsr()
    split_loads = (loads / scale[:, None]).ravel()[split_expert]
    cost = np.concatenate([np.zeros(num_splits), np.ones(num_layers)])
    solved = linprog(cost, at_most, -fixed.ravel(), whole, split_loads, method="highs")
    assert solved.status == 0, solved.message
    best: Float64Array = solved.x[num_splits:] * scale
    return best

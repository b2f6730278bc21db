"""Single experts: the hottest, with their replicas, and which are chosen together. Pure.

Shape legend: L MoE layers, E logical experts, K top-k, N sampled tokens, H experts shown of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ep.load import Int64Array, totals
from ep.placement import Placement
from ep.trace import Trace

NUM_SHOWN = 16
"""H, at most."""


@dataclass(frozen=True)
class HotExpert:
    """layer: the checkpoint's number. load: pairs over the layer's mean expert. share: of the layer's pairs.
    shards, planned_shards: where its replicas lie in the current placement and in the plan."""

    layer: int
    expert: int
    pairs: int
    load: float
    share: float
    prefill_pairs: int
    decode_pairs: int
    shards: tuple[int, ...]
    planned_shards: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Coactivation:
    """One layer's hottest experts, two by two, over the sampled tokens.

    together: int64 [H, H], tokens that chose both; its diagonal, tokens that chose the one. lift: float64 [H, H],
    P(both) / (P(one) P(other)): 1 where the choices are independent; NaN on the diagonal and where one was not sampled.
    """

    layer: int
    num_tokens: int
    experts: tuple[int, ...]
    together: Int64Array
    lift: npt.NDArray[np.float64]


def hottest(trace: Trace, planned: Placement, top: int) -> tuple[HotExpert, ...]:
    """The `top` experts of all layers with the most pairs, the most first."""
    spec = trace.header.spec
    prefill, decode = (
        totals(trace.windows, (spec.num_moe_layers, spec.num_experts), phase) for phase in ("prefill", "decode")
    )
    counts = prefill + decode
    order = np.argsort(-counts, axis=None, kind="stable")[:top]
    found = []
    for layer_pos, expert in zip(*np.unravel_index(order, counts.shape), strict=True):
        pairs, of_layer = int(counts[layer_pos, expert]), int(counts[layer_pos].sum())
        found.append(
            HotExpert(
                layer=spec.moe_layers[layer_pos],
                expert=int(expert),
                pairs=pairs,
                load=pairs * spec.num_experts / max(of_layer, 1),
                share=pairs / max(of_layer, 1),
                prefill_pairs=int(prefill[layer_pos, expert]),
                decode_pairs=int(decode[layer_pos, expert]),
                shards=shards_of(trace.current, layer_pos, expert),
                planned_shards=shards_of(planned, layer_pos, expert),
            )
        )
    return tuple(found)


def coactivation(trace: Trace, counts: Int64Array) -> tuple[Coactivation, ...]:
    """One for each layer; none where no tokens were sampled. counts: int64 [L, E], by which the hottest are chosen."""
    spec = trace.header.spec
    sampled = np.concatenate([window.sampled_ids for window in trace.windows])
    if not len(sampled):
        return ()
    found = []
    for layer_pos, layer in enumerate(spec.moe_layers):
        experts = np.argsort(-counts[layer_pos], kind="stable")[:NUM_SHOWN]
        chosen = (sampled[:, layer_pos, :, None] == experts).any(axis=1).astype(np.int64)
        together = chosen.T @ chosen
        alone = together.diagonal().astype(np.float64)
        expected = np.outer(alone, alone) / len(sampled)
        lift = np.divide(together, expected, out=np.full(expected.shape, np.nan), where=expected > 0)
        np.fill_diagonal(lift, np.nan)
        found.append(Coactivation(layer, len(sampled), tuple(experts.tolist()), together, lift))
    return tuple(found)


def shards_of(placement: Placement, layer_pos: int, expert: int) -> tuple[int, ...]:
    """The shards that hold a replica of an expert."""
    lookup = placement.lookup()
    count = lookup.num_replicas[layer_pos, expert]
    return tuple(lookup.shard_idx[layer_pos, expert, :count].tolist())

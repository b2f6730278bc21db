"""Made-up loads of experts: two windows in a row, one to plan for and the next to judge the plan on.

Shape legend: L MoE layers, E logical experts, T tokens, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]

LOADS = ("uniform", "zipf-0.5", "zipf-0.75", "zipf-1.0", "zipf-1.25", "zipf-1.5", "bursty", "drifting")
TOKENS_PER_EXPERT = 4000
"""Mean of a window: about what 128,000 tokens give each of 256 experts with top-8."""
BURSTS, BURST_GAIN = 4, 8.0
DRIFT = 0.5


@dataclass(frozen=True)
class Windows:
    """past, next: float64 [L, E], tokens of each expert. next_shares: float64 [L, E], what `next` is drawn from."""

    past: Float64Array
    next: Float64Array
    next_shares: Float64Array


def windows(name: str, num_layers: int, num_experts: int, seed: int) -> Windows:
    """Every expert's tokens are drawn by Poisson's law around its share.

    uniform: equal shares. zipf-A: shares of rank**-A, in another order in each layer. bursty: zipf-0.75 in which four
    experts of each layer have eight times their share for one window, others in the next. drifting: zipf-1.0, and from
    one window to the next each share is multiplied by exp(g), g normal with a deviation of 0.5.
    """
    rng = np.random.default_rng((seed, LOADS.index(name)))
    exponent = {"uniform": 0.0, "bursty": 0.75, "drifting": 1.0}.get(name)
    if exponent is None:
        exponent = float(name.removeprefix("zipf-"))
    ranks = np.arange(1.0, num_experts + 1)
    base = rng.permuted(np.tile(ranks**-exponent, (num_layers, 1)), axis=1)
    past, coming = base, base
    if name == "bursty":
        past, coming = _with_bursts(base, rng), _with_bursts(base, rng)
    elif name == "drifting":
        coming = base * np.exp(rng.normal(0.0, DRIFT, base.shape))
    past, coming = (shares / shares.sum(axis=1, keepdims=True) for shares in (past, coming))
    total = TOKENS_PER_EXPERT * num_experts
    drawn = [rng.poisson(shares * total).astype(np.float64) for shares in (past, coming)]
    return Windows(drawn[0], drawn[1], coming)


def _with_bursts(shares: Float64Array, rng: np.random.Generator) -> Float64Array:
    hot = rng.random(shares.shape).argsort(axis=1)[:, :BURSTS]
    burst = shares.copy()
    np.put_along_axis(burst, hot, np.take_along_axis(shares, hot, axis=1) * BURST_GAIN, axis=1)
    return burst


def batch(shares: Float64Array, num_tokens: int, top_k: int, rng: np.random.Generator) -> Int32Array:
    """Experts int32 [T, K], every one drawn by shares [E], so that batches have the load that was planned for.

    A token may name an expert twice: were its experts all different, none could have more than 1 / K of the load, and
    Zipf's law with an exponent of 1 gives the first of 256 more than an eighth.
    """
    return rng.choice(len(shares), size=(num_tokens, top_k), p=shares).astype(np.int32)

"""What other numbers of shards and of replicas would do for the recorded load, and what they would cost. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ep.load import Int64Array
from ep.planning.what_if import REDUNDANTS, SHARDS, what_if
from ep.trace import Trace

OnProgress = Callable[[int, int], None]
"""Called with (plans made, plans in all)."""


@dataclass(frozen=True)
class WhatIfNumbers:
    """A plan for other numbers of shards and of redundant slots per layer, judged on the load of the whole trace.

    over_bound: as in PlacementNumbers. extra_bytes_per_shard: of the slots beyond those without redundancy, on the
    fullest shard. kv_tokens_lost: tokens of KV cache that this memory would hold.
    """

    num_shards: int
    num_redundant: int
    slots_per_shard: int
    excess: float
    evenness: float
    over_bound: float
    extra_bytes_per_shard: int
    kv_tokens_lost: int


def what_if_numbers(
    trace: Trace, counts: Int64Array, on_progress: OnProgress | None = None
) -> tuple[WhatIfNumbers, ...]:
    """One for each pair of numbers that can exist, by shards, then redundant slots. counts: int64 [L, E]."""
    spec = trace.header.spec
    pairs = [(num_shards, num_redundant) for num_shards in SHARDS for num_redundant in REDUNDANTS]
    found = []
    for done, (shards, redundant) in enumerate(pairs, start=1):
        for row in what_if(counts, spec.expert_bytes, (shards,), (redundant,)):
            found.append(
                WhatIfNumbers(
                    num_shards=row.num_shards,
                    num_redundant=row.num_redundant,
                    slots_per_shard=row.slots_per_shard,
                    excess=row.excess,
                    evenness=row.evenness,
                    over_bound=row.gap,
                    extra_bytes_per_shard=row.extra_bytes_per_shard,
                    kv_tokens_lost=row.extra_bytes_per_shard // spec.kv_bytes_per_token,
                )
            )
        if on_progress is not None:
            on_progress(done, len(pairs))
    return tuple(found)

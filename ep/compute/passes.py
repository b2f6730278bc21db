"""Waiting requests as passes of bounded size, and a pass's pairs as a padded table. Pure host work.

Shape legend: T tokens, K choices per token (a table's width), P pairs (token, slot) of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ep.compute.base import Work


@dataclass(frozen=True)
class PairTable:
    """slot_ids int32 [T, K], -1 where a token has fewer slots than K, and weights float32 [T, K], 0 there."""

    slot_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


def pair_table(works: Sequence[Work], top_k: int) -> PairTable:
    """The pairs of all works, one row per token, in order.

    K is the smallest power of two (or top_k itself) that holds every token's pairs: few widths, so that few kernels are
    compiled. top_k bounds the counts.
    """
    counts = np.concatenate([work.counts for work in works])
    most = int(counts.max())
    width = min(top_k, 1 << (most - 1).bit_length())
    taken = np.arange(width) < counts[:, None]
    slot_ids = np.full(taken.shape, -1, dtype=np.int32)
    weights = np.zeros(taken.shape, dtype=np.float32)
    slot_ids[taken] = np.concatenate([work.slot_ids for work in works])
    weights[taken] = np.concatenate([work.weights for work in works])
    return PairTable(slot_ids, weights)


def passes(works: Sequence[Work], max_tokens: int) -> Iterator[list[Work]]:
    """The works, in order, in groups of at most max_tokens tokens and one kind of rows (with or without scales).

    Works that fit together are not parted; one larger than max_tokens is cut into parts, views of the same memory.
    """
    group: list[Work] = []
    room = max_tokens
    for part in (part for work in works for part in _parts(work, max_tokens)):
        if group and (len(part.counts) > room or (part.scales is None) != (group[0].scales is None)):
            yield group
            group, room = [], max_tokens
        group.append(part)
        room -= len(part.counts)
    if group:
        yield group


def _parts(work: Work, max_tokens: int) -> Iterator[Work]:
    num_tokens = len(work.counts)
    if num_tokens <= max_tokens:
        yield work
        return
    pair_ends = work.counts.cumsum(dtype=np.int64)
    for first in range(0, num_tokens, max_tokens):
        tokens = slice(first, min(first + max_tokens, num_tokens))
        pairs = slice(int(pair_ends[first - 1]) if first else 0, int(pair_ends[tokens.stop - 1]))
        yield Work(
            work.rows[tokens],
            None if work.scales is None else work.scales[tokens],
            work.counts[tokens],
            work.slot_ids[pairs],
            work.weights[pairs],
            work.out[tokens],
        )


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of all parts; no copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))

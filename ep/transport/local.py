"""Shards in the router's own process: no connection, the same messages and memory layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ep.errors import EpError, ShardFailedError, TransportError
from ep.transport.base import Endpoint, Partial
from ep.transport.buffer import Buffer, DispatchViews
from ep.wire import Dispatch, combine_bytes, max_combine_bytes, max_dispatch_bytes


class LocalShard(Protocol):
    """What the transport calls of an ep.shard.Shard."""

    def answer(self, message: Dispatch, views: DispatchViews, out: torch.Tensor) -> int: ...


@dataclass
class _Link:
    shard: LocalShard
    outgoing: Buffer
    incoming: Buffer
    message: Dispatch | None = None
    views: DispatchViews | None = None
    is_waiting: bool = False


class LocalTransport:
    """Computes each shard's part when its answer is asked for, one shard after the other."""

    def __init__(self, shards: Sequence[LocalShard], hidden_size: int, top_k: int, max_tokens: int = 2048) -> None:
        self.max_tokens = max_tokens
        self._hidden_size = hidden_size
        self._links = [
            _Link(
                shard,
                Buffer(max_dispatch_bytes(max_tokens, top_k, hidden_size)),
                Buffer(max_combine_bytes(max_tokens, hidden_size)),
            )
            for shard in shards
        ]

    @property
    def num_shards(self) -> int:
        return len(self._links)

    def prepare(self, shard_idx: int, message: Dispatch, deadline: float) -> DispatchViews:
        link = self._links[shard_idx]
        link.message = message
        link.views = link.outgoing.dispatch_views(message, self._hidden_size)
        return link.views

    def dispatch(self, shard_idx: int) -> int:
        link = self._links[shard_idx]
        assert link.views is not None
        link.is_waiting = True
        return link.views.rows.nbytes

    def receive(self, deadline: float) -> Partial:
        shard_idx, link = next((i, link) for i, link in enumerate(self._links) if link.is_waiting)
        assert link.message is not None and link.views is not None
        link.is_waiting = False
        message = link.message
        rows = link.incoming.combine_rows(message.num_tokens, self._hidden_size, message.combine_dtype)
        try:
            compute_ns = link.shard.answer(message, link.views, rows)
        except EpError as error:
            raise ShardFailedError(shard_idx, str(error)) from error
        return Partial(
            shard_idx, rows, compute_ns, combine_bytes(message.num_tokens, self._hidden_size, message.combine_dtype)
        )

    def abandon(self) -> None:
        for link in self._links:
            link.is_waiting = False

    def replace(self, shard_idx: int, endpoint: Endpoint) -> None:
        raise TransportError(f"shard {shard_idx}: lives in the router's process and has no endpoint")

    def describe(self, shard_idx: int) -> str:
        return "in process"

    def close(self) -> None:
        self._links = []

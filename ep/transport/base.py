"""What a data plane offers the router, and the addresses by which shards are found.

Shape legend: T tokens sent to one shard, H hidden, P pairs (token, slot); ep/wire.py has the layout.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch

from ep.model import ModelSpec
from ep.transport.buffer import DispatchViews
from ep.wire import Dispatch


@dataclass(frozen=True)
class Endpoint:
    """Where a shard listens. Its unix socket is used by routers on the same node, TCP by all others."""

    shard_idx: int
    node_id: str
    unix_path: str | None
    tcp_host: str | None
    tcp_port: int | None

    def describe(self, node_id: str) -> str:
        """The address that a router on `node_id` uses."""
        return f"unix:{self.unix_path}" if self.is_near(node_id) else f"tcp:{self.tcp_host}:{self.tcp_port}"

    def is_near(self, node_id: str) -> bool:
        return self.unix_path is not None and self.node_id == node_id


@dataclass(frozen=True)
class Partial:
    """A shard's answer. rows [T, H] bf16 or float32 in the order of the dispatch; they are the transport's memory and
    stay valid until the next dispatch to this shard."""

    shard_idx: int
    rows: torch.Tensor
    compute_ns: int
    num_bytes: int


class Transport(Protocol):
    """Carries dispatches to shards and partials back. One call of `Router.moe` at a time."""

    @property
    def num_shards(self) -> int: ...

    @property
    def max_tokens(self) -> int:
        """The most tokens in one dispatch."""
        ...

    def prepare(self, shard_idx: int, message: Dispatch, deadline: float) -> DispatchViews:
        """The memory that a dispatch goes out from, for the caller to fill. Reconnects if the link is down.
        Raises ShardLostError, DeadlineError."""
        ...

    def dispatch(self, shard_idx: int) -> int:
        """Sends what was prepared; returns its bytes. Never waits for the shard; a broken link shows in `receive`."""
        ...

    def receive(self, deadline: float) -> Partial:
        """The next answer of any shard, whichever comes first. `deadline` is on time.monotonic's clock.

        Raises ShardLostError or ShardFailedError for one shard, DeadlineError for one that is late; the answers of the
        others can still be received.
        """
        ...

    def abandon(self) -> None:
        """Gives up on every answer not yet received; late ones are discarded."""
        ...

    def replace(self, shard_idx: int, endpoint: Endpoint) -> None:
        """From now on this shard is found at `endpoint`."""
        ...

    def describe(self, shard_idx: int) -> str:
        """How this shard is reached, in words."""
        ...

    def close(self) -> None: ...


def spec_fingerprint(spec: ModelSpec) -> str:
    """Equal for equal specs, wherever they were read from: both ends of a connection must serve the same model."""
    values: list[Any] = [getattr(spec, field.name) for field in fields(spec) if field.compare]
    return hashlib.sha256(repr(values).encode()).hexdigest()[:32]

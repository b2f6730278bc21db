"""The router's side of the socket transport: a channel to every shard, shared memory on a node, TCP between nodes."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ep.errors import DeadlineError, ShardFailedError, ShardLostError, TransportError
from ep.transport.base import Endpoint, Partial
from ep.transport.buffer import DispatchViews
from ep.transport.channel import Channel
from ep.transport.handshake import Greeting, greet
from ep.transport.tcp import tune
from ep.wire import BLOCK_BYTES, Combine, Dispatch, Failure, Frame, Message, Ping, Pong, dispatch_layout, encode

log = logging.getLogger(__name__)
CONNECT_S = 5.0
RECONNECT_S = 1.0
"""A link that broke is tried again before a dispatch, which holds up the whole batch."""
NO_MESSAGE = Ping(0)


@dataclass
class _Link:
    """A shard as this router sees it.

    unanswered: the seq last posted on the channel, None once answered. is_awaited: `receive` still owes that answer, or
    the news that it will not come, to its caller; arrived or lost says which.
    """

    shard_idx: int
    endpoint: Endpoint
    channel: Channel | None = None
    message: Message = NO_MESSAGE
    unanswered: int | None = None
    posted_at: float = 0.0
    is_awaited: bool = False
    arrived: Frame | None = None
    lost: str = ""


class SocketTransport:
    """Implements ep.transport.base.Transport. node_id is the router's own node: shards there are reached without TCP.

    Connects to all endpoints when made: raises ShardLostError naming the one that cannot be reached within connect_s.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        greeting: Greeting,
        key: bytes,
        node_id: str,
        connect_s: float = CONNECT_S,
    ) -> None:
        self.max_tokens = greeting.max_tokens
        self._greeting = greeting
        self._key = key
        self._node_id = node_id
        self._connect_s = connect_s
        self._links = [_Link(shard_idx, endpoint) for shard_idx, endpoint in enumerate(endpoints)]
        self._link_of: dict[int, _Link] = {}
        self._poll = select.poll()
        try:
            for link in self._links:
                self._connect(link, time.monotonic() + connect_s)
        except TransportError:
            self.close()
            raise

    @property
    def num_shards(self) -> int:
        return len(self._links)

    def prepare(self, shard_idx: int, message: Dispatch, deadline: float) -> DispatchViews:
        channel = self._free_channel(self._links[shard_idx], deadline)
        self._links[shard_idx].message = message
        return channel.outgoing.dispatch_views(message, self._greeting.hidden_size)

    def dispatch(self, shard_idx: int) -> int:
        link = self._links[shard_idx]
        message = link.message
        assert isinstance(message, Dispatch)
        layout = dispatch_layout(message.num_tokens, message.num_pairs, self._greeting.hidden_size, message.dtype)
        self._post(link, message, message.seq, layout.total)
        return BLOCK_BYTES + layout.total

    def receive(self, deadline: float) -> Partial:
        while True:
            for link in self._links:
                if link.is_awaited and (link.arrived is not None or link.lost):
                    return self._deliver(link)
            if not self._wait(deadline):
                self._give_up(next(link for link in self._links if link.is_awaited))

    def ping(self, shard_idx: int, timeout_s: float) -> float:
        """Seconds of a round trip of one block. Between calls of `Router.moe` only. Raises as `receive`."""
        start = time.monotonic()
        link = self._links[shard_idx]
        self._free_channel(link, start + timeout_s)
        self._post(link, Ping(1), 1, 0)
        link.is_awaited = False
        self._drain(link, start + timeout_s)
        if link.lost:
            raise ShardLostError(shard_idx, link.lost)
        return time.monotonic() - start

    def abandon(self) -> None:
        for link in self._links:
            link.is_awaited = False

    def replace(self, shard_idx: int, endpoint: Endpoint) -> None:
        """Raises TransportError."""
        link = self._links[shard_idx]
        self._disconnect(link, "replaced")
        link.endpoint = endpoint
        self._connect(link, time.monotonic() + self._connect_s)

    def describe(self, shard_idx: int) -> str:
        return self._links[shard_idx].endpoint.describe(self._node_id)

    def close(self) -> None:
        for link in self._links:
            self._disconnect(link, "closed")

    def _connect(self, link: _Link, deadline: float) -> None:
        endpoint = link.endpoint
        sock, address = unconnected(endpoint, self._node_id)
        try:
            sock.settimeout(max(deadline - time.monotonic(), 1e-3))
            sock.connect(address)
            link.channel = greet(sock, self._greeting, link.shard_idx, self._key, deadline)
        except (OSError, TransportError) as error:
            sock.close()
            where = endpoint.describe(self._node_id)
            raise ShardLostError(link.shard_idx, f"cannot be reached at {where}: {error}") from error
        link.lost = ""
        link.unanswered = None
        for fd in link.channel.fds():
            self._link_of[fd] = link
            self._poll.register(fd, select.POLLIN)

    def _disconnect(self, link: _Link, reason: str) -> None:
        if link.channel is None:
            return
        for fd in link.channel.fds():
            self._link_of.pop(fd, None)
            with contextlib.suppress(KeyError, ValueError):
                self._poll.unregister(fd)
        link.channel.close()
        link.channel = None
        link.unanswered = None
        link.lost = reason

    def _free_channel(self, link: _Link, deadline: float) -> Channel:
        """A channel on which nothing is under way: a late answer is awaited and thrown away first."""
        if link.unanswered is not None:
            self._drain(link, deadline)
        if link.channel is None:
            self._connect(link, min(deadline, time.monotonic() + min(self._connect_s, RECONNECT_S)))
        assert link.channel is not None
        return link.channel

    def _drain(self, link: _Link, deadline: float) -> None:
        while link.unanswered is not None:
            if not self._wait(deadline):
                self._give_up(link)

    def _wait(self, deadline: float) -> bool:
        """Handles what happens next on any channel; False if nothing does before the deadline."""
        left = deadline - time.monotonic()
        events = self._poll.poll(max(left, 0) * 1000)
        for fd, event in events:
            link = self._link_of.get(fd)
            if link is not None:
                self._handle(link, fd, event)
        return bool(events)

    def _post(self, link: _Link, message: Message, seq: int, payload_bytes: int) -> None:
        assert link.channel is not None
        link.unanswered = seq
        link.is_awaited = True
        link.arrived = None
        link.posted_at = time.monotonic()
        try:
            if not link.channel.post(encode(message, payload_bytes), payload_bytes):
                self._watch(link, select.POLLIN | select.POLLOUT)
        except OSError as error:
            self._disconnect(link, f"connection ended: {error}")

    def _handle(self, link: _Link, fd: int, event: int) -> None:
        """Moves a channel on; link.arrived is set once this completes the answer to what was posted last."""
        assert link.channel is not None
        try:
            if event & select.POLLOUT and link.channel.flush():
                self._watch(link, select.POLLIN)
            frame = link.channel.take(fd) if event & ~select.POLLOUT else None
            if frame is None:
                return
            if not isinstance(frame.message, (Combine, Failure, Pong)):
                raise TransportError(f"{type(frame.message).__name__} came instead of an answer")
            if frame.message.seq == link.unanswered:
                link.unanswered = None
                link.arrived = frame
        except (OSError, TransportError) as error:
            self._disconnect(link, f"connection ended: {error}")

    def _deliver(self, link: _Link) -> Partial:
        link.is_awaited = False
        frame, asked, channel = link.arrived, link.message, link.channel
        if frame is None or channel is None:
            raise ShardLostError(link.shard_idx, link.lost)
        assert isinstance(asked, Dispatch)
        message = frame.message
        if isinstance(message, Failure):
            raise ShardFailedError(link.shard_idx, message.reason)
        if not isinstance(message, Combine) or (message.num_tokens, message.dtype) != (
            asked.num_tokens,
            asked.combine_dtype,
        ):
            self._disconnect(link, f"answered {message} to {asked}")
            raise ShardLostError(link.shard_idx, link.lost)
        rows = channel.incoming.combine_rows(message.num_tokens, self._greeting.hidden_size, message.dtype)
        return Partial(link.shard_idx, rows, message.compute_ns, BLOCK_BYTES + frame.payload_bytes)

    def _give_up(self, link: _Link) -> NoReturn:
        """The deadline has passed. The late shard's connection ends: it may still write to the memory of this one."""
        waited = time.monotonic() - link.posted_at
        link.is_awaited = False
        self._disconnect(link, f"did not answer within {waited:.3g} s")
        raise DeadlineError(link.shard_idx, round(waited, 3))

    def _watch(self, link: _Link, events: int) -> None:
        assert link.channel is not None
        for fd in link.channel.fds():
            self._poll.register(fd, events)


def unconnected(endpoint: Endpoint, node_id: str) -> tuple[socket.socket, Any]:
    """An unconnected socket and the address that it is to be connected to."""
    if endpoint.is_near(node_id):
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), endpoint.unix_path
    host = endpoint.tcp_host
    if host is None:
        raise ShardLostError(endpoint.shard_idx, f"listens on node {endpoint.node_id} only, this is node {node_id}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    tune(sock)
    return sock, (host, endpoint.tcp_port)

"""One connection to one shard, one question at a time: how a shard reads another's slots, and tries its own.

Shape legend: T tokens, H hidden.
"""

from __future__ import annotations

import select
import time
import zlib
from collections.abc import Callable

import torch

from ep.errors import ShardFailedError, ShardLostError, TransportError, WireError
from ep.transport.base import Endpoint
from ep.transport.buffer import DispatchViews
from ep.transport.channel import Channel
from ep.transport.handshake import Greeting, greet
from ep.transport.sockets import unconnected
from ep.wire import Chunk, Combine, Dispatch, Failure, Fetch, Frame, Message, dispatch_layout, encode


class Peer:
    """Connects when made. Every method raises ShardLostError when the shard is gone or silent for timeout_s,
    ShardFailedError for what it refuses. For one thread."""

    def __init__(
        self, endpoint: Endpoint, greeting: Greeting, key: bytes, node_id: str, timeout_s: float = 10.0
    ) -> None:
        self._shard_idx = endpoint.shard_idx
        self._hidden_size = greeting.hidden_size
        self._timeout_s = timeout_s
        self._seq = 0
        sock, address = unconnected(endpoint, node_id)
        try:
            sock.settimeout(timeout_s)
            sock.connect(address)
            deadline = time.monotonic() + timeout_s
            self._channel: Channel = greet(sock, greeting, endpoint.shard_idx, key, deadline)
        except (OSError, TransportError) as error:
            sock.close()
            where = endpoint.describe(node_id)
            raise ShardLostError(endpoint.shard_idx, f"cannot be reached at {where}: {error}") from error
        self._poll = select.poll()
        for fd in self._channel.fds():
            self._poll.register(fd, select.POLLIN)

    @property
    def max_chunk(self) -> int:
        """The most bytes of one `fetch`."""
        return self._channel.incoming.capacity

    def fetch(self, layer_pos: int, slot_idx: int, offset: int, length: int) -> tuple[Chunk, torch.Tensor]:
        """length bytes of a slot, uint8, valid until the next call."""
        self._seq += 1
        chunk = self._ask(Fetch(self._seq, layer_pos, slot_idx, offset, length), 0).message
        if not isinstance(chunk, Chunk):
            raise ShardLostError(self._shard_idx, f"answered {chunk} to a Fetch")
        data = self._channel.incoming.raw(length)
        if zlib.crc32(data.numpy().data) != chunk.crc32:
            where = f"slot {slot_idx} of MoE layer {layer_pos}"
            raise ShardLostError(self._shard_idx, f"{where}: checksum differs on arrival")
        return chunk, data

    def compute(self, message: Dispatch, fill: Callable[[DispatchViews], None]) -> torch.Tensor:
        """The partials [T, H] of one dispatch, whose memory `fill` is given."""
        fill(self._channel.outgoing.dispatch_views(message, self._hidden_size))
        num_bytes = dispatch_layout(message.num_tokens, message.num_pairs, self._hidden_size, message.dtype).total
        answer = self._ask(message, num_bytes).message
        if not isinstance(answer, Combine):
            raise ShardLostError(self._shard_idx, f"answered {answer} to a Dispatch")
        return self._channel.incoming.combine_rows(answer.num_tokens, self._hidden_size, answer.dtype).clone()

    def close(self) -> None:
        self._channel.close()

    def _ask(self, message: Message, payload_bytes: int) -> Frame:
        deadline = time.monotonic() + self._timeout_s
        try:
            is_sent = self._channel.post(encode(message, payload_bytes), payload_bytes)
            while True:
                wanted = select.POLLIN if is_sent else select.POLLIN | select.POLLOUT
                for fd in self._channel.fds():
                    self._poll.register(fd, wanted)
                events = self._poll.poll(max(deadline - time.monotonic(), 0) * 1000)
                if not events:
                    raise ShardLostError(self._shard_idx, f"did not answer within {self._timeout_s:g} s")
                for fd, event in events:
                    if event & select.POLLOUT and not is_sent:
                        is_sent = self._channel.flush()
                    frame = self._channel.take(fd) if event & ~select.POLLOUT else None
                    if frame is not None:
                        if isinstance(frame.message, Failure):
                            raise ShardFailedError(self._shard_idx, frame.message.reason)
                        return frame
        except (OSError, WireError) as error:
            raise ShardLostError(self._shard_idx, f"connection ended: {error}") from error

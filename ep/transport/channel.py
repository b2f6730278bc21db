"""A connection after its handshake: frames out of one buffer, frames into another, never blocking.

At most one frame is under way in each direction: a router sends its next one only after the answer to the last. So a
frame can be read with one call straight to where it stays, and the memory of a frame is free when the next is written.
"""

from __future__ import annotations

import socket
from typing import Protocol

from ep.errors import WireError
from ep.transport.buffer import Buffer
from ep.wire import BLOCK_BYTES, Frame, decode


class Channel(Protocol):
    """Both ends of both kinds. `take` raises ConnectionError when the peer is gone, WireError for what is no frame."""

    outgoing: Buffer
    incoming: Buffer

    def fds(self) -> tuple[int, ...]:
        """Descriptors that become readable when there is something to take."""
        ...

    def post(self, block: bytes, payload_bytes: int) -> bool:
        """Sends a block and the start of outgoing's payload. False if the rest must wait until the peer reads: `flush`
        when `fds` are writable."""
        ...

    def flush(self) -> bool:
        """Sends what is left of the last post; True when all of it is on its way."""
        ...

    def take(self, fd: int) -> Frame | None:
        """A complete frame, its payload in `incoming`, after `fd` became readable; None if there is none yet."""
        ...

    def close(self) -> None: ...


class StreamChannel:
    """Frames through a TCP or unix socket: sendmsg out of, recvmsg_into into preallocated buffers."""

    def __init__(self, sock: socket.socket, outgoing_capacity: int, incoming_capacity: int) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.outgoing = Buffer(outgoing_capacity)
        self.incoming = Buffer(incoming_capacity)
        self._unsent: list[memoryview] = []
        self._filled = 0
        self._frame: Frame | None = None

    def fds(self) -> tuple[int, ...]:
        return (self._sock.fileno(),)

    def post(self, block: bytes, payload_bytes: int) -> bool:
        if self._unsent:
            raise WireError("a frame is posted before the last one is sent")
        self._unsent = [memoryview(block), self.outgoing.payload[:payload_bytes]]
        return self.flush()

    def flush(self) -> bool:
        while self._unsent:
            try:
                sent = self._sock.sendmsg(self._unsent)
            except BlockingIOError:
                return False
            while self._unsent and sent >= len(self._unsent[0]):
                sent -= len(self._unsent.pop(0))
            if sent:
                self._unsent[0] = self._unsent[0][sent:]
        return True

    def take(self, fd: int) -> Frame | None:
        while True:
            try:
                count = self._sock.recvmsg_into(self._room())[0]
            except BlockingIOError:
                return None
            if not count:
                raise ConnectionError("the peer closed the connection")
            self._filled += count
            if self._filled < BLOCK_BYTES:
                continue
            if self._frame is None:
                self._frame = decode(self.incoming.block, self.incoming.capacity)
            missing = BLOCK_BYTES + self._frame.payload_bytes - self._filled
            if missing < 0:
                raise WireError("a frame follows before the last one is answered")
            if missing == 0:
                frame, self._frame, self._filled = self._frame, None, 0
                return frame

    def _room(self) -> list[memoryview]:
        """Where the next bytes go."""
        if self._frame is not None:
            return [self.incoming.payload[self._filled - BLOCK_BYTES : self._frame.payload_bytes]]
        return [self.incoming.block[self._filled :], self.incoming.payload]

    def close(self) -> None:
        self._sock.close()

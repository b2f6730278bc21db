"""Frames through memory shared by two processes of one node; an eventfd for each direction wakes the other side.

The router makes a memory file without a name and two eventfds and passes them over the unix socket, so nothing of it
outlives the processes, however they end. The socket stays open: its end is how either side learns that the other died.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
from dataclasses import dataclass

import numpy as np

from ep.errors import WireError
from ep.transport.buffer import Buffer
from ep.wire import BLOCK_BYTES, Frame, decode

NUM_FDS = 3


def supports() -> tuple[bool, str]:
    """Whether this system has what is needed, and what is missing."""
    for name in ("memfd_create", "eventfd"):
        if not hasattr(os, name):
            return False, f"this system has no {name}"
    return True, "memory file and eventfd"


@dataclass(frozen=True)
class SharedMemory:
    """The descriptors behind a channel: the file holds the router's outgoing buffer, then its incoming one."""

    file: int
    to_shard: int
    to_router: int

    def fds(self) -> list[int]:
        return [self.file, self.to_shard, self.to_router]

    def close(self) -> None:
        for fd in self.fds():
            os.close(fd)


def create(dispatch_capacity: int, combine_capacity: int) -> SharedMemory:
    """Capacities are payload bytes in each direction. Pages are taken when first written."""
    file = os.memfd_create("ep-channel", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, _file_bytes(dispatch_capacity, combine_capacity))
    # Neither side can pull memory from under the other, which would be a SIGBUS there.
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
    return SharedMemory(file, os.eventfd(0, flags), os.eventfd(0, flags))


class ShmChannel:
    """One side of the shared memory. `memory`'s file is closed once mapped, its eventfds belong to the channel."""

    def __init__(
        self,
        sock: socket.socket,
        memory: SharedMemory,
        dispatch_capacity: int,
        combine_capacity: int,
        is_router: bool,
    ) -> None:
        expected = _file_bytes(dispatch_capacity, combine_capacity)
        size = os.fstat(memory.file).st_size
        if size != expected or not fcntl.fcntl(memory.file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise WireError(f"shared memory is {size} bytes, expected {expected}, sealed")
        mapping = np.frombuffer(mmap.mmap(memory.file, expected), dtype=np.uint8)
        os.close(memory.file)
        sock.setblocking(False)
        self._sock = sock
        middle = BLOCK_BYTES + dispatch_capacity
        to_shard = Buffer(dispatch_capacity, mapping[:middle])
        to_router = Buffer(combine_capacity, mapping[middle:])
        self.outgoing, self.incoming = (to_shard, to_router) if is_router else (to_router, to_shard)
        self._ring, self._bell = memory.to_shard, memory.to_router
        if not is_router:
            self._ring, self._bell = self._bell, self._ring
        os.set_blocking(self._bell, False)
        os.set_blocking(self._ring, False)

    def fds(self) -> tuple[int, ...]:
        return (self._bell, self._sock.fileno())

    def post(self, block: bytes, payload_bytes: int) -> bool:
        self.outgoing.block[:] = block
        os.eventfd_write(self._ring, 1)
        return True

    def flush(self) -> bool:
        return True

    def take(self, fd: int) -> Frame | None:
        if fd == self._bell:
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                return None
            return decode(bytes(self.incoming.block), self.incoming.capacity)
        try:
            data = self._sock.recv(1)
        except BlockingIOError:
            return None
        if data:
            raise WireError("bytes on the socket of a shared-memory channel")
        raise ConnectionError("the peer closed the connection")

    def close(self) -> None:
        self._sock.close()
        os.close(self._bell)
        os.close(self._ring)


def _file_bytes(dispatch_capacity: int, combine_capacity: int) -> int:
    return 2 * BLOCK_BYTES + dispatch_capacity + combine_capacity

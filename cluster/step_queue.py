"""The queue between vLLM's executor and a router on the same node: pickled messages over a unix socket.

It has the calls of vLLM's MessageQueue that MultiprocExecutor and WorkerProc make. That queue spins for a second after
every message, which takes a core from the shards of a CPU host, and without spinning it may sleep through a message for
ten seconds; a socket wakes its reader when there is something to read.
"""

from __future__ import annotations

import pickle
import socket
import struct
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_LENGTH = struct.Struct("<Q")


class StepQueue:
    """One connected socket; both ends may enqueue and dequeue. Peers are processes of one `ep serve` and one user."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @classmethod
    def connect(cls, path: str) -> StepQueue:
        """The router's end."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(path)
        return cls(sock)

    def wait_until_ready(self) -> None:
        """A connected socket is ready."""

    def enqueue(self, message: Any, timeout: float | None = None) -> None:
        """Sends one message. Raises TimeoutError, OSError."""
        body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._sock.settimeout(timeout)
        self._sock.sendall(_LENGTH.pack(len(body)) + body)

    def dequeue(self, timeout: float | None = None, indefinite: bool = False) -> Any:
        """The next message, waited for without a bound if timeout is None. Raises TimeoutError, EOFError."""
        self._sock.settimeout(timeout)
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return pickle.loads(self._read(length))

    def shutdown(self) -> None:
        """Closes this end; a reader at the other end gets EOFError."""
        with suppress(OSError):  # the peer may have been faster
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._sock.recv_into(view)
            if count == 0:
                raise EOFError("the other end of a step queue is gone")
            view = view[count:]
        return data


class Broadcast:
    """The executor's sending side: one message to every router."""

    def __init__(self, queues: Sequence[StepQueue]) -> None:
        self._queues = queues

    def enqueue(self, message: Any, timeout: float | None = None) -> None:
        for queue in self._queues:
            queue.enqueue(message, timeout)

    def shutdown(self) -> None:
        for queue in self._queues:
            queue.shutdown()


class Rendezvous:
    """Where routers connect: a unix socket in a folder that only this user can enter."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ep-steps-")
        self.path = str(Path(self._folder.name) / "queue")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen()

    def accept(self, timeout_s: float) -> StepQueue:
        """The next router that connects. Raises TimeoutError."""
        self._listener.settimeout(timeout_s)
        sock, _ = self._listener.accept()
        return StepQueue(sock)

    def close(self) -> None:
        self._listener.close()
        self._folder.cleanup()

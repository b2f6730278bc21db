"""The shard's side of the socket transport: lets routers in and hands their requests to one serving thread.

Accepting and the handshake run on threads of their own, so a slow or hostile peer never holds up a request. Everything
after it is polled by the serving thread, without blocking on any one router.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ep.errors import AuthError, OptionError, WireError
from ep.transport.base import Endpoint
from ep.transport.buffer import DispatchViews
from ep.transport.channel import Channel
from ep.transport.handshake import Admitted, Identity, admit
from ep.transport.tcp import tune
from ep.wire import (
    BLOCK_BYTES,
    Chunk,
    Combine,
    Dispatch,
    Failure,
    Fetch,
    Message,
    Ping,
    Pong,
    combine_bytes,
    dispatch_layout,
    encode,
    shorten,
)

log = logging.getLogger(__name__)
HANDSHAKE_S = 2.0
MAX_HANDSHAKES = 16
"""Handshakes under way at once; a peer beyond them is hung up on."""
ANY_ADDRESS = ("", "0.0.0.0", "::", "*")


@dataclass
class TrafficStats:
    """Counted since the listener opened. dropped: connections ended because of what came over them."""

    connections: int = 0
    requests: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    dropped: int = 0


@dataclass
class Connection:
    """One router. is_busy while it waits for an answer."""

    router: Admitted
    peer: str
    is_busy: bool = False
    is_open: bool = True

    @property
    def channel(self) -> Channel:
        return self.router.channel


@dataclass(frozen=True)
class Request:
    """A router waits for this. The views are the connection's memory until it is answered."""

    connection: Connection
    message: Dispatch
    views: DispatchViews
    out: torch.Tensor


class SlotSource(Protocol):
    """Where the bytes of slots come from."""

    def read_slot(self, message: Fetch, out: torch.Tensor) -> Chunk:
        """Fills out, uint8 [message.length]. Raises WireError."""
        ...


class Listener:
    """`open` once, then `wait` and `answer` or `fail` from one thread; `close` from any."""

    def __init__(self, identity: Identity, key: bytes) -> None:
        self.stats = TrafficStats()
        self._identity = identity
        self._key = key
        self._sockets: list[socket.socket] = []
        self._folder: Path | None = None
        self._own_folder = False
        self._admitted: deque[Connection] = deque()
        self._has_hung_up = False
        self._handshakes = threading.BoundedSemaphore(MAX_HANDSHAKES)
        self._lock = threading.Lock()
        self._poll = select.poll()
        self._connections: dict[int, Connection] = {}
        self.slots: SlotSource | None = None
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        self._poll.register(self._wake_read, select.POLLIN)
        self.is_closed: bool = False

    def open(self, node_id: str, unix_dir: str | Path | None = None, tcp_host: str | None = None) -> Endpoint:
        """Binds and starts accepting; returns at once.

        unix_dir is made with mode 0700 if it is missing (a temporary one if None). tcp_host is this node's own address;
        None listens on the unix socket only. Raises OptionError.
        """
        folder = self._open_folder(unix_dir)
        path = str(folder / f"shard-{self._identity.shard_idx}-{os.getpid()}.sock")
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sockets.append(unix)
        try:
            unix.bind(path)
        except OSError as error:
            raise OptionError(f"{path}: cannot be bound: {error}") from error
        unix.listen(64)
        port = None
        if tcp_host is not None:
            port = self._open_tcp(tcp_host)
        for sock in self._sockets:
            threading.Thread(target=self._accept, args=(sock,), name="ep-accept", daemon=True).start()
        return Endpoint(self._identity.shard_idx, node_id, path, tcp_host, port)

    def wait(self) -> list[Request]:
        """Blocks until something happens; the requests that are complete by then, possibly none. Every one must be
        answered or failed. Returns [] for ever once closed."""
        requests: list[Request] = []
        for fd, event in [] if self.is_closed else self._poll.poll():
            if fd == self._wake_read:
                self._admit()
                continue
            connection = self._connections.get(fd)
            if connection is None:
                continue
            try:
                if event & select.POLLOUT and connection.channel.flush():
                    self._watch(connection, select.POLLIN)
                if event & ~select.POLLOUT:
                    request = self._take(connection, fd)
                    if request is not None:
                        requests.append(request)
            except WireError as error:
                self._drop(connection, str(error))
            except OSError:
                self._forget(connection)
        return [request for request in requests if request.connection.is_open]

    def answer(self, request: Request, compute_ns: int) -> None:
        """Sends request.out back."""
        message = request.message
        num_bytes = combine_bytes(message.num_tokens, self._identity.hidden_size, message.combine_dtype)
        combine = Combine(message.seq, message.combine_dtype, message.num_tokens, compute_ns)
        self.stats.bytes_out += BLOCK_BYTES + num_bytes
        self._post(request.connection, combine, num_bytes)

    def fail(self, request: Request, reason: str) -> None:
        self._post(request.connection, Failure(request.message.seq, shorten(reason)), 0)

    def wake(self) -> None:
        """Makes `wait` return."""
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"\0")

    def close(self) -> None:
        """Stops listening and removes the socket's file. Connections end once the serving thread calls `hang_up`."""
        self.is_closed = True
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                if sock.family == socket.AF_UNIX:
                    Path(sock.getsockname()).unlink(missing_ok=True)
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        if self._own_folder and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self.wake()

    def hang_up(self) -> None:
        """Ends all connections, from the serving thread, those included whose handshake is under way."""
        with self._lock:
            self._has_hung_up = True
        self._admit()
        for connection in {id(c): c for c in self._connections.values()}.values():
            self._forget(connection)

    def _open_folder(self, unix_dir: str | Path | None) -> Path:
        if unix_dir is None:
            self._own_folder = True
            folder = Path(tempfile.mkdtemp(prefix="ep-"))
        else:
            folder = Path(unix_dir)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        status = folder.stat()
        if stat.S_IMODE(status.st_mode) & 0o077 or status.st_uid != os.geteuid():
            raise OptionError(f"{folder}: mode is {stat.S_IMODE(status.st_mode):o}, expected 700 and this user's own")
        return folder

    def _open_tcp(self, host: str) -> int:
        if host in ANY_ADDRESS:
            raise OptionError(f"shard address is {host!r}, expected one address of this node")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        tune(sock)
        self._sockets.append(sock)
        try:
            sock.bind((host, 0))
        except OSError as error:
            raise OptionError(f"shard address {host} cannot be bound: {error}") from error
        sock.listen(64)
        return int(sock.getsockname()[1])

    def _accept(self, listening: socket.socket) -> None:
        while not self.is_closed:
            try:
                sock = listening.accept()[0]
            except OSError:
                if self.is_closed:
                    return
                time.sleep(0.05)  # out of descriptors, or a peer that left again
                continue
            if not self._handshakes.acquire(blocking=False):
                sock.close()
                self._count_drop("unknown peer", f"more than {MAX_HANDSHAKES} handshakes at once")
                continue
            threading.Thread(target=self._shake, args=(sock,), name="ep-handshake", daemon=True).start()

    def _shake(self, sock: socket.socket) -> None:
        peer = "unix peer" if sock.family == socket.AF_UNIX else f"peer {sock.getpeername()[0]}"
        try:
            admitted = admit(sock, self._identity, self._key, time.monotonic() + HANDSHAKE_S)
            with self._lock:
                if self._has_hung_up:  # while hands were shaken
                    admitted.channel.close()
                    return
                self._admitted.append(Connection(admitted, f"router {admitted.router_id} ({peer})"))
            self.wake()
        except (AuthError, WireError, OSError, ValueError) as error:
            sock.close()
            self._count_drop(peer, str(error))
        finally:
            self._handshakes.release()

    def _admit(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        while self._admitted:
            connection = self._admitted.popleft()
            self.stats.connections += 1
            for fd in connection.channel.fds():
                self._connections[fd] = connection
            self._watch(connection, select.POLLIN)
            log.info("shard %d: serves %s", self._identity.shard_idx, connection.peer)

    def _take(self, connection: Connection, fd: int) -> Request | None:
        frame = connection.channel.take(fd)
        if frame is None:
            return None
        message = frame.message
        if connection.is_busy:
            raise WireError("a frame came before the last one was answered")
        if isinstance(message, Ping) and not frame.payload_bytes:
            self._post(connection, Pong(message.seq), 0)
            return None
        if isinstance(message, Fetch) and not frame.payload_bytes:
            self._send_chunk(connection, message)
            return None
        if not isinstance(message, Dispatch):
            raise WireError(f"{type(message).__name__} with {frame.payload_bytes} bytes came instead of Dispatch")
        router = connection.router
        if message.num_tokens > router.max_tokens or message.num_pairs > router.max_tokens * router.top_k:
            raise WireError(f"{message.num_pairs} pairs of {message.num_tokens} tokens, more than was agreed")
        hidden_size = self._identity.hidden_size
        layout = dispatch_layout(message.num_tokens, message.num_pairs, hidden_size, message.dtype)
        if frame.payload_bytes != layout.total:
            raise WireError(f"payload is {frame.payload_bytes} bytes, expected {layout.total}")
        connection.is_busy = True
        self.stats.requests += 1
        self.stats.bytes_in += BLOCK_BYTES + frame.payload_bytes
        channel = connection.channel
        return Request(
            connection,
            message,
            channel.incoming.dispatch_views(message, hidden_size),
            channel.outgoing.combine_rows(message.num_tokens, hidden_size, message.combine_dtype),
        )

    def _send_chunk(self, connection: Connection, message: Fetch) -> None:
        outgoing = connection.channel.outgoing
        if self.slots is None or not 0 < message.length <= outgoing.capacity:
            raise WireError(f"{message.length} bytes of a slot are asked for, expected 1 to {outgoing.capacity}")
        chunk = self.slots.read_slot(message, outgoing.raw(message.length))
        self.stats.bytes_out += BLOCK_BYTES + message.length
        self._post(connection, chunk, message.length)

    def _post(self, connection: Connection, message: Message, payload_bytes: int) -> None:
        if not connection.is_open:
            return
        connection.is_busy = False
        try:
            if not connection.channel.post(encode(message, payload_bytes), payload_bytes):
                self._watch(connection, select.POLLIN | select.POLLOUT)
        except WireError as error:
            self._drop(connection, str(error))
        except OSError:
            self._forget(connection)

    def _watch(self, connection: Connection, events: int) -> None:
        for fd in connection.channel.fds():
            self._poll.register(fd, events)

    def _drop(self, connection: Connection, reason: str) -> None:
        self._forget(connection)
        self._count_drop(connection.peer, reason)

    def _forget(self, connection: Connection) -> None:
        if not connection.is_open:
            return
        connection.is_open = False
        for fd in connection.channel.fds():
            if self._connections.pop(fd, None) is not None:
                self._poll.unregister(fd)
        connection.channel.close()

    def _count_drop(self, peer: str, reason: str) -> None:
        with self._lock:
            self.stats.dropped += 1
            is_first = self.stats.dropped == 1
        if is_first:
            log.warning(
                "shard %d: dropped %s: %s (more of these are only counted)", self._identity.shard_idx, peer, reason
            )

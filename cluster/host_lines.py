"""A TCP connection to a port of every host, kept open by the kernel's heartbeat: whether the host is there is read off
it, without a packet of ours and without work for the process at the other end.

A connection a second to every raylet would tell as much, and takes 0.3 KB of a raylet's memory each time.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from collections.abc import Collection

Port = tuple[str, int]
HEARTBEAT_S = 1
SILENT_S = 2.2
"""Two heartbeats in a row without an answer."""
_LAST_ACK_AT = 56
"""Of tcpi_last_ack_recv in <linux/tcp.h>'s tcp_info: 32 bits, milliseconds ago."""


class HostLines:
    """Used by one thread. heard: when each of the ports was last heard of, seconds since 1970."""

    def __init__(self) -> None:
        self.heard: dict[Port, float] = {}
        self._lines: dict[Port, socket.socket] = {}

    def silent(self, ports: Collection[Port], timeout_s: float) -> dict[Port, str]:
        """Those that are not heard of and take no new connection within timeout_s, all asked at once, and why."""
        for port, line in list(self._lines.items()):
            silent_s = _silent_s(line)
            self.heard[port] = time.time() - silent_s
            if port not in ports or silent_s > SILENT_S or _has_ended(line):
                self._lines.pop(port).close()
        return self._open([port for port in ports if port not in self._lines], timeout_s)

    def close(self) -> None:
        for line in self._lines.values():
            line.close()
        self._lines = {}

    def _open(self, ports: Collection[Port], timeout_s: float) -> dict[Port, str]:
        poll, waiting, found = select.poll(), {}, {}
        for port in ports:
            line = _new_line(port)
            code = line.connect_ex(port)
            if code in (0, errno.EINPROGRESS):
                waiting[line.fileno()] = (line, port)
                poll.register(line, select.POLLOUT)
            else:
                line.close()
                found[port] = os.strerror(code)
        end = time.monotonic() + timeout_s
        while waiting:
            left = max(end - time.monotonic(), 0.0)
            events = poll.poll(left * 1e3)  # at least once: this process may have slept through the whole time
            if not events and not left:
                break
            for fd, _ in events:
                line, port = waiting.pop(fd)
                poll.unregister(fd)
                if code := line.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    line.close()
                    found[port] = os.strerror(code)
                else:
                    self._lines[port], self.heard[port] = line, time.time()
        for line, port in waiting.values():
            line.close()
            found[port] = "does not answer"
        return found


def _new_line(port: Port) -> socket.socket:
    line = socket.socket(socket.AF_INET6 if ":" in port[0] else socket.AF_INET, socket.SOCK_STREAM)
    line.setblocking(False)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, HEARTBEAT_S)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, HEARTBEAT_S)
    return line


def _silent_s(line: socket.socket) -> float:
    """Since the last packet of the other end."""
    info = line.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_ACK_AT + 4)
    return float(struct.unpack_from("=I", info, _LAST_ACK_AT)[0] / 1e3)


def _has_ended(line: socket.socket) -> bool:
    """The server hung up, as it does after a while on those who never say anything: no bad news of the host."""
    poll = select.poll()
    poll.register(line, select.POLLRDHUP)
    return bool(poll.poll(0))

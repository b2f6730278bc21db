"""How the data plane's TCP connections are set, before they connect or listen: an accepted one is set as its listener.

A layer's round trip is a small message each way, and nothing between two of them: what TCP does for long streams is in
its way.
"""

from __future__ import annotations

import contextlib
import socket

_OPTIONS = {
    "TCP_NODELAY": 1,  # small frames leave at once
    # The kernel's heartbeat on idle connections, seconds, and how long sent bytes may stay unacknowledged,
    # milliseconds: a partition ends a connection in 3 to 4 s, at no cost to the processes.
    "TCP_KEEPIDLE": 1,
    "TCP_KEEPINTVL": 1,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 3000,
}
_RTO_MIN_US, _DELACK_MAX_US = 45, 46
"""Options of <linux/tcp.h> that Python has no names for. Linux 6.18 has them; older ones may not."""
_RETRY_US, _ACK_US = 20_000, 5_000
"""The last packet of a message, if it is lost, is sent again so long after a round trip's time; by default 200 ms, in
which the whole batch waits. The receiver must acknowledge sooner than that, also while it computes: by default it waits
40 ms for an answer to send along."""


def tune(sock: socket.socket) -> None:
    """Of a unix socket: nothing."""
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _OPTIONS.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    with contextlib.suppress(OSError):  # a kernel without them; the second is no good without the first
        sock.setsockopt(socket.IPPROTO_TCP, _DELACK_MAX_US, _ACK_US)
        sock.setsockopt(socket.IPPROTO_TCP, _RTO_MIN_US, _RETRY_US)
    if congestion_control(sock).startswith("bbr"):
        # It takes the rate of messages that wait for answers for the link's bandwidth, sends at that rate from the
        # first loss on, and finds it confirmed. Reno is in every kernel and open to every user.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def congestion_control(sock: socket.socket) -> str:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode("ascii")

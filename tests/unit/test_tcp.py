"""How TCP connections of the data plane are set, on both ends."""

from __future__ import annotations

import socket

import pytest

from ep.transport import tcp
from ep.transport.tcp import congestion_control, tune


def connected() -> tuple[socket.socket, socket.socket]:
    """A tuned connection on loopback, the end that connected first."""
    with socket.socket() as listening, socket.socket() as sock:
        tune(listening)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        tune(sock)
        sock.connect(listening.getsockname())
        return sock.dup(), listening.accept()[0]


def option(sock: socket.socket, number: int) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, number)


def test_both_ends_send_at_once_and_notice_a_partition() -> None:
    for sock in connected():
        with sock:
            assert option(sock, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert option(sock, socket.TCP_KEEPIDLE) == option(sock, socket.TCP_KEEPINTVL) == 1
            assert option(sock, socket.TCP_USER_TIMEOUT) == 3000


def test_no_end_paces_by_a_bandwidth_that_it_guesses() -> None:
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")
        except OSError as error:
            pytest.skip(f"this kernel has no bbr for this user: {error}")
        tune(sock)
        assert congestion_control(sock) == "reno"
    for sock in connected():
        with sock:
            assert not congestion_control(sock).startswith("bbr")


def test_another_congestion_control_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "congestion_control", lambda sock: "dctcp")
    with socket.socket() as sock:
        before = congestion_control(sock)
        tune(sock)
        assert congestion_control(sock) == before


def test_a_lost_packet_is_sent_again_soon_and_acknowledged_sooner() -> None:
    for sock in connected():
        with sock:
            try:
                retry_us, ack_us = option(sock, tcp._RTO_MIN_US), option(sock, tcp._DELACK_MAX_US)
            except OSError as error:
                pytest.skip(f"this kernel has no such options: {error}")
            assert 0 < ack_us < retry_us <= 40_000


def test_a_kernel_without_the_newer_options_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "_DELACK_MAX_US", 9999)
    with socket.socket() as sock:
        tune(sock)
        assert option(sock, socket.TCP_NODELAY)


def test_unix_sockets_are_left_as_they_are() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        tune(sock)
        assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

"""What a shard's sockets do with strangers, noise and routers that break the rules: counted, and the shard lives."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep.errors import OptionError
from ep.placement import even_split
from ep.router import Router
from ep.shard import Shard
from ep.transport import handshake
from ep.transport.auth import prove_to_shard
from ep.transport.base import Endpoint
from ep.transport.channel import Channel
from ep.transport.handshake import Greeting
from ep.transport.listener import HANDSHAKE_S
from ep.transport.sockets import SocketTransport
from ep.wire import BLOCK_BYTES, MAGIC, MAX_HEADER_BYTES, PREFIX, Dispatch, Ping, Welcome, dispatch_layout, encode
from tests.unit.shards import KEY, NODE, even_shard, expected, make_experts, make_spec, random_routing, relative_error

SPEC = make_spec()
GREETING = Greeting.of(SPEC, "router-0", 16)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shard, Endpoint]]:
    shard = even_shard(0, 1, torch.bfloat16)
    endpoint = shard.listen(KEY, NODE, host="127.0.0.1", unix_dir=tmp_path_factory.mktemp("s", numbered=True))
    yield shard, endpoint
    shard.close()


def dial(endpoint: Endpoint, is_unix: bool) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET)
    sock.settimeout(5)
    sock.connect(endpoint.unix_path if is_unix else (endpoint.tcp_host, endpoint.tcp_port))
    return sock


def open_channel(endpoint: Endpoint, is_unix: bool) -> tuple[socket.socket, Channel]:
    sock = dial(endpoint, is_unix)
    return sock, handshake.greet(sock, GREETING, 0, KEY, time.monotonic() + 5)


def hangs_up(sock: socket.socket) -> bool:
    """Whether the peer ends the connection within its time; what it says before is thrown away."""
    sock.settimeout(5)
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def wait_for_drops(shard: Shard, count: int) -> int:
    """The counter rises after the connection ended, on another thread."""
    until = time.monotonic() + 5
    while shard.stats().dropped < count and time.monotonic() < until:
        time.sleep(0.002)
    return shard.stats().dropped


def assert_serves(endpoint: Endpoint) -> None:
    """A good router still gets the right answer."""
    transport = SocketTransport([endpoint], GREETING, KEY, NODE)
    router = Router(SPEC, even_split(SPEC.num_moe_layers, SPEC.num_experts, 1), transport)
    hidden, ids, weights = random_routing(SPEC, 5)
    out = router.moe(0, hidden.bfloat16(), ids, weights)
    assert relative_error(out, expected(make_experts(SPEC, torch.bfloat16)[0], hidden, ids, weights)) < 2e-2
    router.close()


both_ways = pytest.mark.parametrize("is_unix", [True, False], ids=["unix", "tcp"])


@both_ways
@given(noise=st.binary(min_size=1, max_size=2000))
@settings(max_examples=20)
def test_noise_of_strangers_is_dropped(served: tuple[Shard, Endpoint], is_unix: bool, noise: bytes) -> None:
    shard, endpoint = served
    before = shard.stats().dropped
    with dial(endpoint, is_unix) as sock:
        with contextlib.suppress(OSError):  # it hung up first
            sock.sendall(noise)
            sock.shutdown(socket.SHUT_WR)
        assert hangs_up(sock)
    assert wait_for_drops(shard, before + 1) == before + 1


@both_ways
@given(noise=st.binary(min_size=BLOCK_BYTES, max_size=3000))
@settings(max_examples=20)
def test_noise_of_routers_is_dropped(served: tuple[Shard, Endpoint], is_unix: bool, noise: bytes) -> None:
    shard, endpoint = served
    sock, channel = open_channel(endpoint, is_unix)
    before = shard.stats().dropped
    with contextlib.suppress(OSError):
        sock.sendall(noise)
    assert hangs_up(sock)
    assert wait_for_drops(shard, before + 1) == before + 1
    channel.close()


@given(noise=st.binary(min_size=BLOCK_BYTES, max_size=BLOCK_BYTES))
@settings(max_examples=20)
def test_noise_in_shared_memory_is_dropped(served: tuple[Shard, Endpoint], noise: bytes) -> None:
    shard, endpoint = served
    sock, channel = open_channel(endpoint, is_unix=True)
    before = shard.stats().dropped
    channel.post(noise, 0)
    assert hangs_up(sock)
    assert wait_for_drops(shard, before + 1) == before + 1
    channel.close()


def dispatch_block(message: Dispatch, payload_bytes: int | None = None) -> bytes:
    layout = dispatch_layout(message.num_tokens, message.num_pairs, SPEC.hidden_size, message.dtype)
    return encode(message, layout.total if payload_bytes is None else payload_bytes)


BROKEN = {
    "oversized header": PREFIX.pack(MAGIC, MAX_HEADER_BYTES + 1, 0).ljust(BLOCK_BYTES, b"\0"),
    "oversized payload": PREFIX.pack(MAGIC, 3, 1 << 40).ljust(BLOCK_BYTES, b"\0"),
    "too many tokens": dispatch_block(Dispatch(1, 0, 0, "bf16", "f32", 17, 17)),
    "too many slots": dispatch_block(Dispatch(1, 0, 0, "bf16", "f32", 16, 16 * SPEC.top_k + 1)),
    "other length": dispatch_block(Dispatch(1, 0, 0, "bf16", "f32", 4, 4), payload_bytes=0),
    "no request": encode(Welcome(1, 0, 0, 1)),
    "ping with a payload": encode(Ping(1), 64),
}


@both_ways
@pytest.mark.parametrize("block", BROKEN.values(), ids=BROKEN.keys())
def test_a_router_that_breaks_the_rules_is_dropped(served: tuple[Shard, Endpoint], is_unix: bool, block: bytes) -> None:
    shard, endpoint = served
    sock, channel = open_channel(endpoint, is_unix)
    before = shard.stats().dropped
    channel.post(block, 0)
    if not is_unix:
        with contextlib.suppress(OSError):
            sock.sendall(bytes(4096))  # as much payload as any of them declares
    assert hangs_up(sock)
    assert wait_for_drops(shard, before + 1) == before + 1
    channel.close()
    assert_serves(endpoint)


@both_ways
def test_descriptors_and_sizes_of_a_hello_are_checked(served: tuple[Shard, Endpoint], is_unix: bool) -> None:
    shard, endpoint = served
    before = shard.stats().dropped
    with dial(endpoint, is_unix) as sock:
        prove_to_shard(sock, KEY, time.monotonic() + 5)
        hello = handshake.Hello(1, "r", GREETING.fingerprint, "shm", SPEC.hidden_size, 16, SPEC.top_k)
        with Path(os.devnull).open("rb") as null:
            if is_unix:
                socket.send_fds(sock, [encode(hello)], [null.fileno()] * 3)
            else:
                sock.sendall(encode(hello))
            assert hangs_up(sock)
    assert wait_for_drops(shard, before + 1) == before + 1
    assert_serves(endpoint)


def test_silent_strangers_do_not_keep_routers_out(served: tuple[Shard, Endpoint]) -> None:
    _, endpoint = served
    silent = [dial(endpoint, is_unix=False) for _ in range(8)]
    start = time.monotonic()
    assert_serves(endpoint)
    assert time.monotonic() - start < HANDSHAKE_S
    for sock in silent:
        sock.close()


def test_drops_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    shard = even_shard(0, 1, torch.bfloat16)
    endpoint = shard.listen(KEY, NODE)
    with caplog.at_level(logging.WARNING, "ep"):
        for _ in range(3):
            with dial(endpoint, is_unix=True) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert hangs_up(sock)
        assert wait_for_drops(shard, 3) == 3
    assert len([record for record in caplog.records if "dropped" in record.message]) == 1
    shard.close()


def test_the_folder_is_private_and_cleaned_up(tmp_path: Path) -> None:
    shard = even_shard(0, 1, torch.bfloat16)
    endpoint = shard.listen(KEY, NODE)
    assert endpoint.unix_path is not None and endpoint.tcp_host is None
    folder = Path(endpoint.unix_path).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    shard.close()
    assert not folder.exists()
    given = tmp_path / "given"
    shard = even_shard(0, 1, torch.bfloat16)
    shard.listen(KEY, NODE, unix_dir=given)
    assert stat.S_IMODE(given.stat().st_mode) == 0o700
    shard.close()
    assert list(given.iterdir()) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.0.2.1"])
def test_addresses_that_are_not_this_nodes_are_refused(host: str) -> None:
    with pytest.raises(OptionError, match="address"):
        even_shard(0, 1, torch.bfloat16).listen(KEY, NODE, host=host)


def test_an_open_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(OptionError, match="mode is 755, expected 700"):
        even_shard(0, 1, torch.bfloat16).listen(KEY, NODE, unix_dir=tmp_path)


def test_close_ends_the_connections(tmp_path: Path) -> None:
    shard = even_shard(0, 1, torch.bfloat16)
    endpoint = shard.listen(KEY, NODE, host="127.0.0.1")
    socks = [open_channel(endpoint, is_unix)[0] for is_unix in (True, False)]
    shard.close()
    assert all(hangs_up(sock) for sock in socks)
    with pytest.raises(OSError):
        dial(endpoint, is_unix=False)

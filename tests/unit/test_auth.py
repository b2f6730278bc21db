"""The challenge over real socket pairs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep.errors import AuthError
from ep.transport import auth

KEY = b"k" * 32


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def outcome(call: Callable[[], None]) -> Exception | None:
    try:
        call()
    except (AuthError, OSError) as error:
        return error
    return None


def both(
    pair: tuple[socket.socket, socket.socket], router_key: bytes, shard_key: bytes
) -> tuple[Exception | None, Exception | None]:
    """What either side ends with."""
    router, shard = pair
    found: list[Exception | None] = []

    def prove() -> None:
        found.append(outcome(lambda: auth.prove_to_router(shard, shard_key, time.monotonic() + 2)))
        if found[0] is not None:
            shard.close()

    thread = threading.Thread(target=prove)
    thread.start()
    mine = outcome(lambda: auth.prove_to_shard(router, router_key, time.monotonic() + 2))
    router.close()
    thread.join()
    return mine, found[0]


def test_both_sides_know_the_key(pair: tuple[socket.socket, socket.socket]) -> None:
    assert both(pair, KEY, KEY) == (None, None)


def test_a_router_without_the_key_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    router, shard = both(pair, b"x" * 32, KEY)
    assert isinstance(shard, AuthError)
    assert router is not None


def test_a_shard_without_the_key_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    router, shard = pair
    shard.sendall(auth.MAGIC + b"n" * auth.NONCE_BYTES + auth.MAGIC + b"p" * auth.PROOF_BYTES)
    assert isinstance(outcome(lambda: auth.prove_to_shard(router, KEY, time.monotonic() + 2)), AuthError)


def test_the_shards_own_proof_is_no_proof_of_the_router(pair: tuple[socket.socket, socket.socket]) -> None:
    """A router that mirrors another shard's answer would need the role in it to be its own."""
    nonce = b"n" * auth.NONCE_BYTES
    assert auth._proof(KEY, b"router", nonce, nonce) != auth._proof(KEY, b"shard", nonce, nonce)


def test_silence_ends_at_the_deadline(pair: tuple[socket.socket, socket.socket]) -> None:
    start = time.monotonic()
    assert isinstance(outcome(lambda: auth.prove_to_router(pair[1], KEY, start + 0.05)), TimeoutError)
    assert time.monotonic() - start < 1


def test_an_unknown_protocol_is_noticed_at_its_first_bytes(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].sendall(b"GET")
    error = outcome(lambda: auth.prove_to_router(pair[1], KEY, time.monotonic() + 2))
    assert isinstance(error, AuthError) and "protocol" in str(error)


@given(st.binary(min_size=1, max_size=200))
def test_no_bytes_pass_for_a_proof(noise: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(noise)
        ours.shutdown(socket.SHUT_WR)
        assert isinstance(
            outcome(lambda: auth.prove_to_router(theirs, KEY, time.monotonic() + 2)), (AuthError, OSError)
        )


def test_short_keys_are_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    error = outcome(lambda: auth.prove_to_shard(pair[0], b"short", time.monotonic() + 0.2))
    assert error is not None
    with pytest.raises(AuthError, match="key is 5 bytes"):
        auth._proof(b"short", b"router", b"", b"")

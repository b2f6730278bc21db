"""From a fresh socket to a channel: proof of the key, Hello, Welcome. Both sides, blocking, with a deadline."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass

from ep.errors import AuthError, TransportError, WireError
from ep.model import ModelSpec
from ep.transport import shm
from ep.transport.auth import prove_to_router, prove_to_shard
from ep.transport.base import spec_fingerprint
from ep.transport.channel import Channel, StreamChannel
from ep.wire import (
    BLOCK_BYTES,
    PROTOCOL,
    Failure,
    Hello,
    Message,
    Welcome,
    decode,
    encode,
    max_combine_bytes,
    max_dispatch_bytes,
    shorten,
)

MAX_TOKENS = 8192
MAX_TOP_K = 64


@dataclass(frozen=True)
class Identity:
    """What a shard tells routers, and what it holds them to."""

    shard_idx: int
    fingerprint: str
    hidden_size: int
    generation: int
    num_slots: int
    max_tokens: int


@dataclass(frozen=True)
class Greeting:
    """What a router tells shards about itself. max_tokens: the most it sends at once; buffers are made for that many,
    their pages are taken when first used."""

    router_id: str
    fingerprint: str
    hidden_size: int
    max_tokens: int
    top_k: int

    @classmethod
    def of(cls, spec: ModelSpec, router_id: str, max_tokens: int = MAX_TOKENS) -> Greeting:
        return cls(router_id, spec_fingerprint(spec), spec.hidden_size, max_tokens, spec.top_k)


def greet(sock: socket.socket, greeting: Greeting, shard_idx: int, key: bytes, deadline: float) -> Channel:
    """The router's side. Takes the socket. Raises AuthError, WireError, TransportError (refused), OSError."""
    prove_to_shard(sock, key, deadline)
    is_shared = sock.family == socket.AF_UNIX and shm.supports()[0]
    hello = Hello(
        PROTOCOL,
        greeting.router_id,
        greeting.fingerprint,
        "shm" if is_shared else "stream",
        greeting.hidden_size,
        greeting.max_tokens,
        greeting.top_k,
    )
    to_shard, to_router = _capacities(hello)
    memory = shm.create(to_shard, to_router) if is_shared else None
    try:
        if memory is not None:
            socket.send_fds(sock, [encode(hello)], memory.fds())
        else:
            sock.sendall(encode(hello))
        answer = _receive_message(sock, deadline)
        if isinstance(answer, Failure):
            raise TransportError(f"shard {shard_idx} refuses this router: {answer.reason}")
        if not isinstance(answer, Welcome) or answer.shard_idx != shard_idx:
            raise WireError(f"{answer} came instead of a Welcome from shard {shard_idx}")
        if memory is None:
            return StreamChannel(sock, to_shard, to_router)
        channel = shm.ShmChannel(sock, memory, to_shard, to_router, is_router=True)
        memory = None
        return channel
    finally:
        if memory is not None:
            memory.close()


@dataclass(frozen=True)
class Admitted:
    """A router that has been let in."""

    channel: Channel
    router_id: str
    max_tokens: int
    top_k: int


def admit(sock: socket.socket, identity: Identity, key: bytes, deadline: float) -> Admitted:
    """The shard's side. Takes the socket. Raises AuthError, WireError, OSError."""
    prove_to_router(sock, key, deadline)
    block, fds = _receive_block(sock, deadline)
    try:
        hello = decode(block).message
        if not isinstance(hello, Hello):
            raise WireError(f"{type(hello).__name__} came instead of Hello")
        reason = _refusal(hello, len(fds), identity)
        if reason:
            sock.sendall(encode(Failure(0, shorten(reason))))
            raise WireError(reason)
        to_shard, to_router = _capacities(hello)
        channel: Channel
        if hello.channel == "shm":
            channel = shm.ShmChannel(sock, shm.SharedMemory(*fds), to_shard, to_router, is_router=False)
            fds = []
        else:
            channel = StreamChannel(sock, to_router, to_shard)
    finally:
        for fd in fds:
            os.close(fd)
    sock.sendall(encode(Welcome(PROTOCOL, identity.shard_idx, identity.generation, identity.num_slots)))
    return Admitted(channel, hello.router_id, hello.max_tokens, hello.top_k)


def _capacities(hello: Hello) -> tuple[int, int]:
    """Payload bytes to the shard and back."""
    return (
        max_dispatch_bytes(hello.max_tokens, hello.top_k, hello.hidden_size),
        max_combine_bytes(hello.max_tokens, hello.hidden_size),
    )


def _refusal(hello: Hello, num_fds: int, identity: Identity) -> str:
    """Why this router cannot be served, "" if it can."""
    for what, value, expected in (
        ("protocol", hello.protocol, PROTOCOL),
        ("model", hello.fingerprint, identity.fingerprint),
        ("hidden size", hello.hidden_size, identity.hidden_size),
    ):
        if value != expected:
            return f"{what} is {value}, expected {expected}"
    if not 0 < hello.max_tokens <= identity.max_tokens or not 0 < hello.top_k <= MAX_TOP_K:
        return (
            f"{hello.max_tokens} tokens of {hello.top_k} slots at once, "
            f"expected at most {identity.max_tokens} of {MAX_TOP_K}"
        )
    if (hello.channel, num_fds) not in (("shm", shm.NUM_FDS), ("stream", 0)):
        return f"channel is {hello.channel} with {num_fds} descriptors, expected shm with {shm.NUM_FDS} or stream, 0"
    return ""


def _receive_message(sock: socket.socket, deadline: float) -> Message:
    block, fds = _receive_block(sock, deadline)
    for fd in fds:
        os.close(fd)
    return decode(block).message


def _receive_block(sock: socket.socket, deadline: float) -> tuple[bytes, list[int]]:
    """One block, and the descriptors that came with it."""
    block = b""
    fds: list[int] = []
    try:
        while len(block) < BLOCK_BYTES:
            sock.settimeout(max(deadline - time.monotonic(), 1e-3))
            if sock.family == socket.AF_UNIX:
                part, new_fds, _, _ = socket.recv_fds(sock, BLOCK_BYTES - len(block), shm.NUM_FDS)
                fds += new_fds
            else:
                part = sock.recv(BLOCK_BYTES - len(block))
            if not part:
                raise AuthError("the peer hung up during the handshake")
            block += part
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return block, fds

"""Proof, on both sides, of knowing the cluster's random key before anything else is read.

Three frames of fixed size, so that nothing of an unknown peer is ever parsed:
    shard  -> router   MAGIC, shard's nonce
    router -> shard    MAGIC, router's nonce, HMAC-SHA256(key, "router", both nonces)
    shard  -> router   MAGIC, HMAC-SHA256(key, "shard", both nonces)
The role in the HMAC keeps a proof from being sent back to its maker. What follows is neither encrypted nor signed: the
network between the nodes is trusted not to alter a connection, the key keeps strangers from opening one.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import time

from ep.errors import AuthError

MAGIC = b"EPAUTH01"
NONCE_BYTES = 32
PROOF_BYTES = hashlib.sha256().digest_size
MIN_KEY_BYTES = 16


def new_key() -> bytes:
    """A cluster's key."""
    return secrets.token_bytes(32)


def prove_to_router(sock: socket.socket, key: bytes, deadline: float) -> None:
    """The shard's side. Raises AuthError, OSError."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    _send(sock, MAGIC + nonce, deadline)
    frame = _receive(sock, NONCE_BYTES + PROOF_BYTES, deadline)
    router_nonce, proof = frame[:NONCE_BYTES], frame[NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(key, b"router", nonce, router_nonce)):
        raise AuthError("the peer does not know the cluster's key")
    _send(sock, MAGIC + _proof(key, b"shard", nonce, router_nonce), deadline)


def prove_to_shard(sock: socket.socket, key: bytes, deadline: float) -> None:
    """The router's side. Raises AuthError, OSError."""
    shard_nonce = _receive(sock, NONCE_BYTES, deadline)
    nonce = secrets.token_bytes(NONCE_BYTES)
    _send(sock, MAGIC + nonce + _proof(key, b"router", shard_nonce, nonce), deadline)
    if not hmac.compare_digest(_receive(sock, PROOF_BYTES, deadline), _proof(key, b"shard", shard_nonce, nonce)):
        raise AuthError("the peer does not know the cluster's key")


def _proof(key: bytes, role: bytes, shard_nonce: bytes, router_nonce: bytes) -> bytes:
    if len(key) < MIN_KEY_BYTES:
        raise AuthError(f"the cluster's key is {len(key)} bytes, expected at least {MIN_KEY_BYTES}")
    return hmac.digest(key, MAGIC + role + shard_nonce + router_nonce, "sha256")


def _send(sock: socket.socket, frame: bytes, deadline: float) -> None:
    sock.settimeout(_left(deadline))
    sock.sendall(frame)


def _receive(sock: socket.socket, num_bytes: int, deadline: float) -> bytes:
    """A frame's body: MAGIC is checked as soon as it is there."""
    frame = bytearray()
    while len(frame) < len(MAGIC) + num_bytes:
        sock.settimeout(_left(deadline))
        part = sock.recv(len(MAGIC) + num_bytes - len(frame))
        if not part:
            raise AuthError("the peer hung up during the challenge")
        frame += part
        if frame[: len(MAGIC)] != MAGIC[: len(frame)]:
            raise AuthError("the peer does not speak this protocol")
    return bytes(frame[len(MAGIC) :])


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the challenge was not answered in time")
    return left

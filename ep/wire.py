"""Every message of the data plane, and the fixed-size block that carries it.

A frame is one block of BLOCK_BYTES, then `payload_bytes` of tensor bytes. The block holds a binary prefix (magic,
length of the header, length of the payload) and a msgpack array [kind, field, ...] of one message; the rest is zeros.
A block of one size can be read with one call into a buffer that exists, lies at a known place in shared memory, and
bounds what a peer can make us parse.

Payloads (every part starts at a multiple of ALIGN bytes):
    Dispatch  counts int32 [T], slot_ids int32 [P], weights float32 [P], scales float32 [T, ceil(H / 128)] (fp8 only),
              rows [T, H]
    Combine   partials [T, H]
    Chunk     bytes of a slot

Shape legend: T tokens sent to one shard, H hidden, P pairs (token, slot).
Pairs are in token order, counts[t] of them for token t: the rows of a sparse matrix in CSR format, nothing is padded.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from functools import lru_cache
from operator import attrgetter
from typing import Any, ClassVar

import msgpack

from ep.errors import WireError

PROTOCOL = 2
MAGIC = b"EP\x00\x01"
BLOCK_BYTES = 512
PREFIX = struct.Struct("<4sIQ")
MAX_HEADER_BYTES = BLOCK_BYTES - PREFIX.size
MAX_TEXT_BYTES = 256
ALIGN = 64
TOKEN_BLOCK = 128
ROW_BYTES = {"bf16": 2, "f32": 4, "fp8": 1}
"""Bytes of one value of a token's row, by the dtype's name on the wire."""

_UINT_LIMIT = 1 << 63


@dataclass(frozen=True)
class Message:
    """Base of all messages. Fields are unsigned int and str; anything else is refused on arrival."""

    kind: ClassVar[int]

    def check(self) -> None:
        """Raises WireError where the fields' values cannot be meant."""


@dataclass(frozen=True)
class Hello(Message):
    """A router introduces itself: what it serves, how it wants to exchange tensors, and how large they get (max_tokens
    of at most top_k slots each).

    channel is "shm" (descriptors of a memory file and two eventfds come with this block) or "stream".
    """

    kind: ClassVar[int] = 1
    protocol: int
    router_id: str
    fingerprint: str
    channel: str
    hidden_size: int
    max_tokens: int
    top_k: int


@dataclass(frozen=True)
class Welcome(Message):
    """The shard takes the connection."""

    kind: ClassVar[int] = 2
    protocol: int
    shard_idx: int
    generation: int
    num_slots: int


@dataclass(frozen=True)
class Dispatch(Message):
    """Tokens of one layer for one shard. layer_pos counts MoE layers. Every token has at least one slot."""

    kind: ClassVar[int] = 3
    seq: int
    generation: int
    layer_pos: int
    dtype: str
    combine_dtype: str
    num_tokens: int
    num_pairs: int

    def check(self) -> None:
        if self.dtype not in ROW_BYTES or self.combine_dtype not in ("bf16", "f32"):
            raise WireError(f"Dispatch: dtype is {self.dtype} to {self.combine_dtype}, expected {list(ROW_BYTES)}")
        if not 0 < self.num_tokens <= self.num_pairs:
            raise WireError(f"Dispatch: {self.num_pairs} pairs of {self.num_tokens} tokens, expected at least one each")


@dataclass(frozen=True)
class Combine(Message):
    """A shard's partials for one dispatch, in its token order. compute_ns is the time of the experts alone."""

    kind: ClassVar[int] = 4
    seq: int
    dtype: str
    num_tokens: int
    compute_ns: int

    def check(self) -> None:
        if self.dtype not in ("bf16", "f32") or self.num_tokens < 1:
            raise WireError(f"Combine: {self.num_tokens} tokens of {self.dtype}, expected some of bf16 or f32")


@dataclass(frozen=True)
class Failure(Message):
    """A shard could not do what was asked (seq 0: the connection itself was refused)."""

    kind: ClassVar[int] = 5
    seq: int
    reason: str


@dataclass(frozen=True)
class Ping(Message):
    kind: ClassVar[int] = 6
    seq: int


@dataclass(frozen=True)
class Pong(Message):
    kind: ClassVar[int] = 7
    seq: int


@dataclass(frozen=True)
class Fetch(Message):
    """A shard that is to hold an expert too asks for bytes of a slot that holds it."""

    kind: ClassVar[int] = 8
    seq: int
    layer_pos: int
    slot_idx: int
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk(Message):
    """The bytes asked for, as payload. slot_bytes: of the whole slot; format: what its bytes mean."""

    kind: ClassVar[int] = 9
    seq: int
    slot_bytes: int
    crc32: int
    format: str


class _Codec:
    """Fields of one kind of message, in the order of the wire."""

    def __init__(self, cls: type[Message]) -> None:
        of_name: dict[str, type] = {"int": int, "str": str}
        self.cls = cls
        self.names = tuple(field.name for field in fields(cls))
        self.types = tuple(of_name[str(field.type)] for field in fields(cls))
        self.values = attrgetter(*self.names) if len(self.names) > 1 else lambda message: (message.seq,)

    def build(self, values: tuple[Any, ...]) -> Message:
        """The message with these fields. Raises WireError if they are not what it has."""
        if tuple(map(type, values)) != self.types:
            raise WireError(f"{self.cls.__name__}: fields are not {', '.join(self.names)} of the right types")
        for value in values:
            if not (0 <= value < _UINT_LIMIT if type(value) is int else len(value) <= MAX_TEXT_BYTES):
                raise WireError(f"{self.cls.__name__}: {value!r:.80} is out of range")
        message = self.cls(*values)
        message.check()
        return message


_CODECS = {cls.kind: _Codec(cls) for cls in (Hello, Welcome, Dispatch, Combine, Failure, Ping, Pong, Fetch, Chunk)}


@dataclass(frozen=True)
class Frame:
    """A decoded block: its message and the number of payload bytes that follow it."""

    message: Message
    payload_bytes: int


def encode(message: Message, payload_bytes: int = 0) -> bytes:
    """One block, BLOCK_BYTES long. Raises WireError for a message that does not fit."""
    header = msgpack.packb((message.kind, *_CODECS[message.kind].values(message)))
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(f"{type(message).__name__}: header is {len(header)} bytes, expected at most {MAX_HEADER_BYTES}")
    return (PREFIX.pack(MAGIC, len(header), payload_bytes) + header).ljust(BLOCK_BYTES, b"\0")


def decode(block: bytes | bytearray | memoryview, max_payload_bytes: int = 0) -> Frame:
    """The inverse of `encode`. Raises WireError for anything that `encode` could not have made or that is too large."""
    if len(block) != BLOCK_BYTES:
        raise WireError(f"block is {len(block)} bytes, expected {BLOCK_BYTES}")
    magic, header_bytes, payload_bytes = PREFIX.unpack_from(block)
    if magic != MAGIC:
        raise WireError(f"block starts with {magic!r}, expected {MAGIC!r}")
    if header_bytes > MAX_HEADER_BYTES:
        raise WireError(f"header is {header_bytes} bytes, expected at most {MAX_HEADER_BYTES}")
    if payload_bytes > max_payload_bytes:
        raise WireError(f"payload is {payload_bytes} bytes, expected at most {max_payload_bytes}")
    return Frame(_decode_header(bytes(block[PREFIX.size : PREFIX.size + header_bytes])), payload_bytes)


def _decode_header(header: bytes) -> Message:
    try:
        values: Any = msgpack.unpackb(header, use_list=False, max_array_len=16, max_map_len=0, max_ext_len=0)
    except Exception as error:  # msgpack raises many unrelated types on bytes that are not msgpack
        raise WireError(f"header is not msgpack: {type(error).__name__}: {error}") from error
    if type(values) is not tuple or not values or type(values[0]) is not int or values[0] not in _CODECS:
        raise WireError("header is no message of a known kind")
    return _CODECS[values[0]].build(values[1:])


def shorten(text: str) -> str:
    """Cut to what a text field may hold."""
    return text.encode("utf-8", "replace")[: MAX_TEXT_BYTES - 3].decode("utf-8", "ignore")


@dataclass(frozen=True)
class DispatchLayout:
    """Where the parts of a Dispatch payload start, in bytes, and its length."""

    counts: int
    slot_ids: int
    weights: int
    scales: int
    rows: int
    total: int


@lru_cache(maxsize=4096)
def dispatch_layout(num_tokens: int, num_pairs: int, hidden_size: int, dtype: str) -> DispatchLayout:
    slot_ids = _aligned(4 * num_tokens)
    weights = slot_ids + _aligned(4 * num_pairs)
    scales = weights + _aligned(4 * num_pairs)
    rows = scales + (_aligned(4 * num_tokens * num_scales(hidden_size)) if dtype == "fp8" else 0)
    return DispatchLayout(0, slot_ids, weights, scales, rows, rows + num_tokens * hidden_size * ROW_BYTES[dtype])


def num_scales(hidden_size: int) -> int:
    """Scales of one token."""
    return -(-hidden_size // TOKEN_BLOCK)


def max_dispatch_bytes(max_tokens: int, top_k: int, hidden_size: int) -> int:
    """The largest Dispatch payload of any dtype."""
    num_pairs = max_tokens * top_k
    return _aligned(max(dispatch_layout(max_tokens, num_pairs, hidden_size, dtype).total for dtype in ROW_BYTES))


def max_combine_bytes(max_tokens: int, hidden_size: int) -> int:
    """The largest Combine payload of any dtype."""
    return _aligned(combine_bytes(max_tokens, hidden_size, "f32"))


def combine_bytes(num_tokens: int, hidden_size: int, dtype: str) -> int:
    return num_tokens * hidden_size * ROW_BYTES[dtype]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGN) * ALIGN

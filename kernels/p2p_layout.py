"""What lies where in the memory that a router and a shard write for each other, and the words that they signal with.

Shapes: T tokens (most of one message), K choices per token, H hidden, S shards, L MoE layers, E logical experts,
N routers.

    inbox, on the shard's GPU, for each router:  rows [T, H] | scales [T, H/128] | slot ids [T, K] | weights [T, K]
    return box, on the router's GPU:             a flag for each shard | partials [S, T, H]
    mailbox, 8 bytes of host memory for each router and shard:  number, layer and tokens of the newest message

A message is published by one 8-byte store of its header: whoever sees it sees all of the message.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep.kernels.reference import TOKEN_BLOCK

LINE = 128
"""Bytes from one word that somebody waits for to the next: two cache lines, which processors fetch together."""

ALIGNMENT = 256

SEQ, STEP, NUM_TOKENS, NUM_DECODE, FAILED, PLANNED, SENT = (slot * (LINE // 4) for slot in range(7))
"""Places in a router's words [NUM_WORDS] int32 on its device. SEQ: the last message's number. STEP: the step's number,
from 1 on. NUM_TOKENS, NUM_DECODE: its real rows, the first of which are decode. FAILED: 1 after a wait was given up.
The others count programs."""

JOB, RETURNED = 0, LINE // 4
"""Places in a shard's words [NUM_WORDS] int32 on its device: jobs begun so far, and a count of programs."""

NUM_WORDS = 7 * (LINE // 4)

ABORT, FAILED_STEP, WAITING_SEQ, DONE_SEQ = (slot * (LINE // 4) for slot in range(4))
"""Places in a router's words in host memory [ROUTER_WORDS] int32, each in its own line. ABORT: set by hosts, ends its
waits. The others are written by its kernels. FAILED_STEP: the step of the first wait that was given up, 0 for none.
WAITING_SEQ, DONE_SEQ: a wait that is slow says so, and that it is over."""

LATE = 4 * (LINE // 4)
"""From here on one word per shard: 1 if its answer was missing when a wait was given up."""

MAX_LAYERS, MAX_MESSAGE_TOKENS = 1 << 11, 1 << 20
"""What a header has room for."""

MAX_JOINED = 8
"""Messages that one job of a shard may join."""

JOB_TOKENS, JOB_LAYER, JOB_IDX, JOB_ROUTERS = 0, 1, 2, 4
"""Places in a job [JOB_WORDS] int32: its tokens and layer, its number, then MAX_JOINED routers (-1 for none), their
first rows, numbers of rows, messages' numbers, and whether this job ends their message."""

JOB_WORDS = 64


def router_words(num_shards: int) -> int:
    """Words of one router in host memory."""
    lines = -(-num_shards * 4 // LINE)
    return LATE + lines * (LINE // 4)


def pack_header(seq: int, layer_pos: int, num_tokens: int) -> int:
    """As the kernels do."""
    return (layer_pos << 52) | (num_tokens << 32) | (seq & 0xFFFFFFFF)


@dataclass(frozen=True)
class Header:
    """seq wraps around at 2^31, as int32."""

    seq: int
    layer_pos: int
    num_tokens: int

    @classmethod
    def unpack(cls, word: int) -> Header:
        low = word & 0xFFFFFFFF
        return cls(low - ((low & 0x80000000) << 1), word >> 52, (word >> 32) & 0xFFFFF)


@dataclass(frozen=True)
class MessageShape:
    """What both sides must agree on. dtype: of the rows, an e4m3 with scales or bfloat16. partial_dtype: of what comes
    back, bfloat16 or float32."""

    max_tokens: int
    hidden: int
    top_k: int
    dtype: torch.dtype
    partial_dtype: torch.dtype = torch.bfloat16

    @property
    def quantized(self) -> bool:
        return self.dtype.itemsize == 1

    @property
    def row_bytes(self) -> int:
        """Of one token in a message."""
        scales = self.hidden // TOKEN_BLOCK * 4 if self.quantized else 0
        return self.hidden * self.dtype.itemsize + scales + self.top_k * 8

    @property
    def partial_row_bytes(self) -> int:
        """Of what comes back for it."""
        return self.hidden * self.partial_dtype.itemsize

    @property
    def scales_offset(self) -> int:
        return _align(self.max_tokens * self.hidden * self.dtype.itemsize)

    @property
    def slot_ids_offset(self) -> int:
        blocks = self.hidden // TOKEN_BLOCK if self.quantized else 0
        return self.scales_offset + _align(self.max_tokens * blocks * 4)

    @property
    def weights_offset(self) -> int:
        return self.slot_ids_offset + _align(self.max_tokens * self.top_k * 4)

    @property
    def inbox_bytes(self) -> int:
        return self.weights_offset + _align(self.max_tokens * self.top_k * 4)

    @property
    def partial_bytes(self) -> int:
        """Of one shard's partials."""
        return _align(self.max_tokens * self.hidden * self.partial_dtype.itemsize)

    def partials_offset(self, num_shards: int) -> int:
        """In a return box; the flags lie before, LINE bytes apart."""
        return _align(num_shards * LINE)

    def return_bytes(self, num_shards: int) -> int:
        return self.partials_offset(num_shards) + num_shards * self.partial_bytes

    def check(self) -> tuple[bool, str]:
        """Whether the kernels can carry such messages, and why not."""
        if self.dtype not in (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.bfloat16):
            return False, f"rows are {self.dtype}, expected an e4m3 or bfloat16"
        if self.partial_dtype not in (torch.bfloat16, torch.float32):
            return False, f"partials are {self.partial_dtype}, expected bfloat16 or float32"
        if self.hidden % TOKEN_BLOCK or not self.hidden:
            return False, f"hidden size is {self.hidden}, expected a multiple of {TOKEN_BLOCK}"
        if not 0 < self.max_tokens < MAX_MESSAGE_TOKENS:
            return False, f"{self.max_tokens} tokens in a message, expected 1 to {MAX_MESSAGE_TOKENS - 1}"
        if not 0 < self.top_k <= 64:
            return False, f"{self.top_k} choices per token, expected 1 to 64"
        return True, "ok"


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

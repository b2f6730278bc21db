"""What lies where in the memory that a router and a shard write for each other, and the words that they signal with.

Shapes: T tokens (most of one message), K choices per token, H hidden, S shards, L MoE layers, E logical experts,
N routers.

    inbox, on the shard's GPU, for each router:  rows [T, H] | scales [T, H/128] | slot ids [T, K] | weights [T, K] |
                                                 flags [T] | header: number, tokens, generation and layer of the newest
    return box, on the router's GPU:             flags [S, T] | partials [S, T, H]
    mailbox, 8 bytes of host memory for each router and shard:  the header once more, for the shard's host

Row t is token t of the call, at either end, whether the shard has some of its experts or not. The header comes first
and says that a message is on its way; each of its tokens is published by its flag, 2 * number + 1, or 2 * number where
the shard gets no row of it. The answer's rows are published by flags that are the message's number. Number 0 is none.
A flag is compared for equality: one that is 2^31 messages old would be taken for a new one, if its row was not used
since.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ep.kernels.reference import TOKEN_BLOCK

LINE = 128
"""Bytes from one word that somebody waits for to the next: two cache lines, which processors fetch together."""

ALIGNMENT = 256

SEQ, SENT, STEP, NUM_TOKENS, NUM_DECODE, FAILED, GENERATION = (slot * (LINE // 4) for slot in range(7))
"""Places in a router's words [NUM_WORDS] int32 on its device. SEQ: the last answered message's number; SENT: of the
last one that was sent. STEP: the step's number, from 1 on. NUM_TOKENS, NUM_DECODE: its real rows, the first of which
are decode. FAILED: 1 after a wait was given up. GENERATION: of the placement that it routes by."""

JOB, RETURNED, NEXT, DEBT, IDLE, COUNTED, POLLED, WAITED, LOOKED = (slot * (LINE // 4) for slot in range(9))
"""Places in a shard's words [NUM_WORDS] int32 on its device. JOB: jobs that have ended. RETURNED: a count of programs.
NEXT: the router that is looked at first. DEBT: looks for further messages that have not paid yet. IDLE: 1 after a job
that found no message. COUNTED: from here on NUM_COUNTS sums. POLLED, WAITED, LOOKED: the twin's looks for a message,
for further ones and for a message's rows."""

NUM_WORDS = 9 * (LINE // 4)

JOBS, MESSAGES, JOINED, TOKENS = range(4)
"""What is summed up: jobs that found messages, if only some that they left to a larger job, messages that are answered,
parts of jobs that had several, rows."""
NUM_COUNTS = 4

STOP, DONE, ANSWERED = 0, LINE // 4, 2 * (LINE // 4)
"""Places in a shard's words in host memory [shard_words(N)] int32. STOP: set by its host, ends jobs that wait for a
message. DONE: jobs that have ended, and behind it the sums. ANSWERED: from here on the newest message of each router
that is answered."""

MAX_SERVED = 8
"""Generations that a shard may serve at a time."""

ABORT, FAILED_STEP, WAITING_SEQ, DONE_SEQ, BEGUN = (slot * (LINE // 4) for slot in range(5))
"""Places in a router's words in host memory [ROUTER_WORDS] int32, each in its own line. ABORT: set by hosts, ends its
waits. The others are written by its kernels. FAILED_STEP: the step of the first wait that was given up, 0 for none.
WAITING_SEQ, DONE_SEQ: a wait that is slow says so, and that it is over. BEGUN: its device has begun a step, with
messages of so many rows (pack_begun)."""

LATE = 5 * (LINE // 4)
"""From here on one word per shard: 1 if its answer was missing when a wait was given up."""

TOKENS_AT, GENERATION_AT, LAYER_AT = 32, 45, 53
"""The first bits in a header of what follows the number."""
MAX_MESSAGE_TOKENS, NUM_GENERATIONS, MAX_LAYERS = 1 << 13, 1 << 8, 1 << 11
"""What a header has room for; generations are counted modulo NUM_GENERATIONS there."""

MAX_ROUTERS = 64
"""Of one shard."""

JOB_LAYER, ENDED, NUMBERS = 0, 4, 4 + MAX_ROUTERS
"""Places in a job [JOB_WORDS] int32: its layer, then for each router whether the job ends a message of it, and its
number."""

JOB_WORDS = 4 + 2 * MAX_ROUTERS

ROW_BITS = 13
"""A job's row comes from router `source >> ROW_BITS`, row `source & (1 << ROW_BITS) - 1` of its message."""


BEGUN_STEPS = 1 << 18
"""Modulo which begun steps are counted."""


def pack_begun(count: int, num_rows: int) -> int:
    """A word for BEGUN, positive as int32: another one for every step."""
    return count % BEGUN_STEPS << ROW_BITS | num_rows


def begun_rows(word: int) -> int:
    """0: of a router that has begun no step."""
    return word & (1 << ROW_BITS) - 1


LIKELY_UNIT = 256

def likely_part(top_k: int, num_shards: int) -> int:
    """Of LIKELY_UNIT tokens of a message, how many have experts on one of the shards that these are split over: a
    quarter more than if the choices were even."""
    share = 1 - (1 - 1 / num_shards) ** top_k
    return math.ceil(1.25 * share * LIKELY_UNIT)


def likely_rows(num_tokens: int, part: int) -> int:
    """Of a message, by likely_part."""
    return min(-(-num_tokens * part // LIKELY_UNIT) + 1, num_tokens)


def router_words(num_shards: int) -> int:
    """Words of one router in host memory."""
    lines = -(-num_shards * 4 // LINE)
    return LATE + lines * (LINE // 4)


def shard_words(num_routers: int) -> int:
    """Words of one shard in host memory."""
    return ANSWERED + -(-num_routers * 4 // LINE) * (LINE // 4)


def pack_header(seq: int, layer_pos: int, num_tokens: int, generation: int = 0) -> int:
    """As the kernels do; an int64."""
    word = (layer_pos << LAYER_AT) | (generation % NUM_GENERATIONS << GENERATION_AT) | (num_tokens << TOKENS_AT)
    word |= seq & 0xFFFFFFFF
    return word - ((word & 1 << 63) << 1)


@dataclass(frozen=True)
class Header:
    """seq wraps around at 2^31, as int32; generation at NUM_GENERATIONS."""

    seq: int
    layer_pos: int
    num_tokens: int
    generation: int = 0

    @classmethod
    def unpack(cls, word: int) -> Header:
        low = word & 0xFFFFFFFF
        return cls(
            low - ((low & 0x80000000) << 1),
            word >> LAYER_AT & MAX_LAYERS - 1,
            word >> TOKENS_AT & MAX_MESSAGE_TOKENS - 1,
            word >> GENERATION_AT & NUM_GENERATIONS - 1,
        )


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
    def flags_offset(self) -> int:
        return self.weights_offset + _align(self.max_tokens * self.top_k * 4)

    @property
    def header_offset(self) -> int:
        return self.flags_offset + _align(self.max_tokens * 4)

    @property
    def inbox_bytes(self) -> int:
        return self.header_offset + ALIGNMENT

    @property
    def partial_bytes(self) -> int:
        """Of one shard's partials."""
        return _align(self.max_tokens * self.hidden * self.partial_dtype.itemsize)

    def partials_offset(self, num_shards: int) -> int:
        """In a return box; the flags lie before."""
        return _align(num_shards * self.max_tokens * 4)

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

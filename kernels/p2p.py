"""Router and shards on GPUs of one node that write into each other's memory: the kernels of one round trip.

    router   begin ─> dispatch ────────────────────────────────────────────> wait ─> combine
                        └─ header, rows and flags ─> inboxes                  ^
    shard                                      take ─> collect ─> experts ─> return: partials and flags

A shard's job may be launched before the message is there that it takes: ep/ipc_server.py keeps some of them ahead. It
learns of a message before its rows are there, and every row has a flag of its own at either end: nobody waits for a
last program.
Static shapes, counts that live on the device, no allocation, no word from a host: all of it may be captured in graphs.
One source for NVIDIA and AMD; kernels/p2p_layout.py says what lies where, kernels/p2p_reference.py has torch twins.

Shapes: T rows of a call, K choices per token, H hidden, S shards, P slots per shard, L MoE layers, E logical experts, R
replicas of an expert at most, N routers of a shard, C capacity of a job, M most tokens of a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ep.kernels import p2p_layout as layout
from ep.kernels.p2p_layout import MessageShape
from ep.kernels.p2p_router import (
    begin_kernel,
    combine_kernel,
    dispatch_kernel,
    wait_and_combine_kernel,
    wait_kernel,
)
from ep.kernels.p2p_shard import collect_kernel, return_kernel, take_kernel
from ep.kernels.quant import fp8_max
from ep.kernels.reference import MIN_AMAX, TOKEN_BLOCK

WINDOW = 512
"""Tokens among which an expert's pairs are dealt to its replicas in turn."""
LOOK_BACK = 256
"""(token, choice) pairs of those that are looked at together."""
PATIENCE, SLOW = 64, 4096
"""Polls of a wait between looks at the abort word, and after which it says that it waits (about 3 ms)."""
WAITED_FLAGS = 2048
"""Flags that a wait looks at together."""
LOOK = 64
"""Polls of a job that waits for a message between looks at its host's word."""
FLAG_LOOKS, FLAG_BLOCK = 1 << 14, 256
"""Looks for the rows of a message whose header is there (about 15 ms), and how many flags are looked at together."""
CREDIT = 2
"""Windows that jobs may wait for routers, for each layer and for what lies between two steps as for two more; half of
them at a time, which is about half a step of one of two routers."""
WORTH = 8
"""A message is held for its part of that if it, or what it is held for, has less than a WORTH-th of the rows that read
all experts: what is saved in a few steps does not pay for it then."""
RETRY = 16
"""Jobs that pay as much as a message that joins one, so that who was waited for in vain is tried again."""
JOIN_ROWS = 256
"""Up to here a message is waited for, or waits for others: the experts' weights are most of what a job of it reads."""
COMBINE_BLOCK = 1024

TRITON_DTYPES = {
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e4m3fnuz: tl.float8e4b8,
    torch.bfloat16: tl.bfloat16,
}


@dataclass(frozen=True)
class Tables:
    """A placement as the plan reads it; overwritten in place when the placement changes.

    replicas [L, E, R] int32: global slots, shard * P + slot. num_replicas [L, E] int32, 1 to R.
    """

    replicas: torch.Tensor
    num_replicas: torch.Tensor
    slots_per_shard: int


@dataclass(frozen=True)
class Plan:
    """Where the tokens of one call go. Allocated once for M tokens; a call of T rows uses the first T.

    slots [M, K] int32: global slots, -1 for a row that is padding. owners [M] int64: bit s for a row of shard s's
    message. sent [S, 2] int64: rows and messages to each shard, added up until somebody sets them to zero. is_sent [S]
    int32: 0 for shards that get no messages, being reached in another way.
    """

    slots: torch.Tensor
    owners: torch.Tensor
    sent: torch.Tensor
    is_sent: torch.Tensor

    @classmethod
    def allocate(
        cls, max_tokens: int, top_k: int, num_shards: int, device: torch.device, far_shards: Sequence[int] = ()
    ) -> Plan:
        """far_shards: those that are reached in another way."""

        def sums(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        is_sent = [int(shard not in far_shards) for shard in range(num_shards)]
        slots = torch.full((max_tokens, top_k), -1, dtype=torch.int32, device=device)
        return cls(slots, sums(max_tokens), sums(num_shards, 2),
                   torch.tensor(is_sent, dtype=torch.int32, device=device))  # fmt: skip

    @property
    def num_shards(self) -> int:
        return len(self.sent)


def supports(message: MessageShape, num_shards: int, num_layers: int) -> tuple[bool, str]:
    """Whether the kernels can do this, and why not."""
    if not 0 < num_shards <= 64:
        return False, f"{num_shards} shards, expected 1 to 64"
    if not 0 < num_layers <= layout.MAX_LAYERS:
        return False, f"{num_layers} MoE layers, expected 1 to {layout.MAX_LAYERS}"
    return message.check()


def begin_step(
    words: torch.Tensor, host_address: int, num_tokens: int, num_decode: int, step: int, begun: int
) -> None:
    """The first num_tokens rows of the calls that follow are tokens, the first num_decode of them decode. step: its
    number. begun: for hosts to know when the device comes here, layout.pack_begun of the rows of a message, or 0.

    words [NUM_WORDS] int32; host_address: the router's words in host memory.
    """
    begin_kernel[(1,)](
        words, host_address, num_tokens, num_decode, step, begun, NUM_TOKENS=layout.NUM_TOKENS,
        NUM_DECODE=layout.NUM_DECODE, STEP=layout.STEP, BEGUN=layout.BEGUN, num_warps=1,
    )  # fmt: skip


def dispatch_tokens(
    x: torch.Tensor, topk_ids: torch.Tensor, weights: torch.Tensor, tables: Tables, plan: Plan, message: MessageShape,
    load: torch.Tensor, inboxes: torch.Tensor, mailboxes: torch.Tensor, words: torch.Tensor, layer_pos: int,
    first_token: int = 0,
) -> None:  # fmt: skip
    """Chooses the slots of a call's tokens and writes each row, quantised once, with its slots and weights into the
    inbox of every shard that has some; a header that says so goes ahead, and into the mailbox for the host.

    x [T, H] bf16, contiguous columns; topk_ids [T, K] int32; weights [T, K] float32; inboxes and mailboxes [S] int64:
    addresses. Rows are tokens first_token .. of the step; those at words[NUM_TOKENS] or beyond are padding. The
    messages' number is words[SEQ] + 1. load [2, L, E] int64 gets one for each pair, [1] those of tokens before
    words[NUM_DECODE]. An expert's pairs go to its replicas in turn, by their rank within WINDOW tokens: the same call
    gives the same answer. Nothing is sent after a wait was given up.
    """
    num_rows, top_k = topk_ids.shape
    num_layers, num_experts, replicas = tables.replicas.shape
    dispatch_kernel[(num_rows,)](
        x, topk_ids, weights, tables.replicas, tables.num_replicas, plan.slots, plan.owners, plan.is_sent, load,
        inboxes, mailboxes, words, x.stride(0), num_rows, first_token, layer_pos, num_layers, num_experts,
        tables.slots_per_shard, message.scales_offset, message.slot_ids_offset, message.weights_offset,
        message.flags_offset, message.header_offset, HIDDEN=message.hidden,
        COLUMNS=triton.next_power_of_2(message.hidden // TOKEN_BLOCK),
        GROUP=TOKEN_BLOCK, TOP_K=top_k, PAD_K=triton.next_power_of_2(top_k), REPLICAS=replicas,
        PAD_R=triton.next_power_of_2(replicas), SHARDS=plan.num_shards, PAD_S=triton.next_power_of_2(plan.num_shards),
        WINDOW=WINDOW, LOOK_BACK=LOOK_BACK, DTYPE=TRITON_DTYPES[message.dtype], QUANTIZE=message.quantized,
        FP8_MAX=fp8_max(message.dtype) if message.quantized else 0.0, MIN_AMAX=MIN_AMAX, SEQ=layout.SEQ,
        SENT=layout.SENT, NUM_TOKENS=layout.NUM_TOKENS, NUM_DECODE=layout.NUM_DECODE, FAILED=layout.FAILED,
        GENERATION=layout.GENERATION, TOKENS_AT=layout.TOKENS_AT, GENERATION_AT=layout.GENERATION_AT,
        LAYER_AT=layout.LAYER_AT, num_warps=8,
    )  # fmt: skip


def wait_partials(
    plan: Plan, flags: torch.Tensor, words: torch.Tensor, host_address: int, num_rows: int, first_token: int = 0
) -> None:
    """One program that ends when every row that was sent is answered, or soon after the abort word is set. It ends the
    messages' number (words[SEQ]) and adds to plan.sent.

    flags [S, M] int32; host_address: the router's words in host memory; num_rows, first_token: of the call. Given up,
    it says so there and in words[FAILED], after which every later wait ends at once.
    """
    wait_kernel[(1,)](
        plan.owners, plan.sent, flags, words, host_address, num_rows, first_token, flags.stride(0),
        num_warps=4, **_waiting(plan, num_rows),
    )  # fmt: skip


def combine_partials(partials: torch.Tensor, plan: Plan, out: torch.Tensor) -> None:
    """out[t] = the sum over the shards of owners[t], in order, of partials[s, t], in float32, rounded once.

    partials [S, M, H] bf16 or float32; out [T, H] bf16 or float32.
    """
    num_rows, hidden = out.shape
    combine_kernel[(num_rows, triton.cdiv(hidden, COMBINE_BLOCK))](
        partials, plan.owners, out, partials.stride(0), HIDDEN=hidden, BLOCK=COMBINE_BLOCK, SHARDS=plan.num_shards,
        num_warps=4,
    )  # fmt: skip


def wait_and_combine(
    partials: torch.Tensor, plan: Plan, out: torch.Tensor, flags: torch.Tensor, words: torch.Tensor, host_address: int,
    first_token: int = 0,
) -> None:  # fmt: skip
    """`wait_partials` and `combine_partials` at once: a row is summed up as soon as it is there. Its programs wait all
    over the GPU: not for one on which a shard of this process computes the answer."""
    num_rows, hidden = out.shape
    wait_and_combine_kernel[(num_rows + 1, triton.cdiv(hidden, COMBINE_BLOCK))](
        partials, plan.owners, out, partials.stride(0), plan.sent, flags, words, host_address, num_rows, first_token,
        flags.stride(0), HIDDEN=hidden, BLOCK=COMBINE_BLOCK, num_warps=4, **_waiting(plan, num_rows),
    )  # fmt: skip


def _waiting(plan: Plan, num_rows: int) -> dict[str, int]:
    """Constants of the kernels that wait."""
    pad_s = triton.next_power_of_2(plan.num_shards)
    block = min(triton.next_power_of_2(num_rows), max(WAITED_FLAGS // pad_s, 16))
    names = ("SEQ", "SENT", "STEP", "NUM_TOKENS", "FAILED", "ABORT", "FAILED_STEP", "WAITING_SEQ", "DONE_SEQ", "LATE")
    places: dict[str, int] = {name: getattr(layout, name) for name in names}
    return {"SHARDS": plan.num_shards, "PAD_S": pad_s, "BLOCK_T": block, "PATIENCE": PATIENCE, "SLOW": SLOW} | places


@dataclass(frozen=True)
class Job:
    """What `take` and `collect` make of waiting messages, for the experts' kernels and `return_partials`. C: capacity.

    rows [C, H] in the message's dtype, scales [C, H/128] float32 where it has scales, slot_ids [C, K] int32, weights
    [C, K] float32. source and numbers [C] int32: which row of which router it is (ROW_BITS), and its message's number.
    job [JOB_WORDS], layer_idx and num_tokens [1] int32.
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    slot_ids: torch.Tensor
    weights: torch.Tensor
    source: torch.Tensor
    numbers: torch.Tensor
    job: torch.Tensor
    layer_idx: torch.Tensor
    num_tokens: torch.Tensor

    @classmethod
    def allocate(cls, message: MessageShape, capacity: int, device: torch.device) -> Job:
        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        size = (capacity, message.hidden)
        rows = torch.zeros(size, device=device).to(message.dtype)
        scales = torch.zeros(capacity, message.hidden // TOKEN_BLOCK, device=device) if message.quantized else None
        pairs = (capacity, message.top_k)
        return cls(rows, scales, ints(*pairs).fill_(-1), torch.zeros(pairs, device=device),
                   ints(capacity), ints(capacity), ints(layout.JOB_WORDS), ints(1), ints(1))  # fmt: skip


@dataclass(frozen=True)
class Desk:
    """Where a shard's jobs find their messages. inboxes [N] int64: addresses, 0 for a router that is not there. served
    [MAX_SERVED] int32: generations modulo NUM_GENERATIONS, -1 for none. taken [N, 4] int32: of each router the last
    message that was taken whole, the last of which some was taken, how many rows of that, and the layer that it will
    ask for next, -1 where that is not waited for. words [NUM_WORDS] int32. host_address: the shard's words in host
    memory."""

    inboxes: torch.Tensor
    served: torch.Tensor
    taken: torch.Tensor
    words: torch.Tensor
    host_address: int

    @classmethod
    def allocate(cls, num_routers: int, device: torch.device, host_address: int) -> Desk:
        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        assert num_routers <= layout.MAX_ROUTERS, num_routers
        inboxes = torch.zeros(num_routers, dtype=torch.int64, device=device)
        desk = cls(inboxes, ints(layout.MAX_SERVED) - 1, ints(num_routers, 4), ints(layout.NUM_WORDS), host_address)
        desk.taken[:, 3] = -1
        return desk


def take(
    desk: Desk, message: MessageShape, num_layers: int, job: Job, capacity: int, largest: int, likely: int,
    patience: int, window: int, whole_rows: int,
) -> None:  # fmt: skip
    """Makes a job of at most `capacity` rows: of the next message in turn, with what else waits for its layer.

    A message is left to a larger job, and this one ends at once if there is no other, where it is likely to have more
    than twice as many rows (`likely`: likely_part) and this is not the `largest`: the experts' weights would be read
    for every piece of it. The host, which sees it too, launches one of that size.

    Looks at most `patience` times for one, only once after a job that found none or when the host says so; a job of no
    rows is the result then. Messages of other generations, layers or lengths are left for the host to refuse.

    Routers that decode are to ask for a layer at the same time, so that the experts' weights are read once for all of
    them: who is less than half of the layers behind another is answered first, and the other's message is held until
    they meet. While nobody can be answered, that costs looks, which are a debt. Each message that joins a longer one's
    job pays what it saves: `window`, the looks in which a layer's experts are read, or its part of that if two of it
    have less than whole_rows, which read all of them. A job waits for half of CREDIT * window * (L + 2) looks (WORTH)
    while no more than that is owed, and not at all else (RETRY). So waiting never takes longer, all in all, than what
    joining has saved and one credit. Who does not come is not waited for again before its next message.
    """
    num_routers = len(desk.inboxes)
    take_kernel[(1,)](
        desk.inboxes, desk.served, desk.taken, desk.words, desk.host_address, job.source, job.numbers, job.job,
        job.layer_idx, job.num_tokens, message.flags_offset, message.header_offset, capacity, largest, likely,
        message.max_tokens, num_layers, patience, window, whole_rows, ROUTERS=num_routers,
        PAD_R=triton.next_power_of_2(num_routers), SERVED=layout.MAX_SERVED, LOOK=LOOK, LIKELY_UNIT=layout.LIKELY_UNIT,
        FLAG_LOOKS=FLAG_LOOKS, BLOCK=FLAG_BLOCK, COLUMNS=desk.taken.shape[1], CREDIT=CREDIT, WORTH=WORTH,
        RETRY=RETRY, JOIN_ROWS=JOIN_ROWS, NEXT=layout.NEXT, DEBT=layout.DEBT, IDLE=layout.IDLE, COUNTED=layout.COUNTED,
        STOP=layout.STOP, JOB_LAYER=layout.JOB_LAYER, ENDED=layout.ENDED, NUMBERS=layout.NUMBERS,
        ROW_BITS=layout.ROW_BITS, TOKENS_AT=layout.TOKENS_AT, GENERATION_AT=layout.GENERATION_AT,
        LAYER_AT=layout.LAYER_AT, MAX_TOKENS=layout.MAX_MESSAGE_TOKENS, GENERATIONS=layout.NUM_GENERATIONS,
        LAYERS=layout.MAX_LAYERS, num_warps=1,
    )  # fmt: skip


def collect(desk: Desk, message: MessageShape, job: Job, capacity: int) -> None:
    """Gathers the job's rows, up to `capacity`, from the routers' inboxes."""
    collect_kernel[(capacity,)](
        job.source, job.num_tokens, desk.inboxes, job.rows, job.scales, job.slot_ids, job.weights,
        message.scales_offset, message.slot_ids_offset, message.weights_offset, HIDDEN=message.hidden,
        PAD_H=triton.next_power_of_2(message.hidden), GROUP=TOKEN_BLOCK,
        COLUMNS=triton.next_power_of_2(message.hidden // TOKEN_BLOCK), TOP_K=message.top_k,
        PAD_K=triton.next_power_of_2(message.top_k), QUANTIZED=message.quantized, ROW_BITS=layout.ROW_BITS,
        ROUTERS=len(desk.inboxes), PAD_R=triton.next_power_of_2(len(desk.inboxes)), num_warps=8,
    )  # fmt: skip


def return_partials(
    partials: torch.Tensor, job: Job, boxes: torch.Tensor, flags: torch.Tensor, desk: Desk, capacity: int
) -> None:
    """Writes each row of partials [C, H] into its router's return box and raises its flag, then tells the host what is
    done.

    boxes and flags [N] int64: addresses of this shard's partials and of its flags in each router's return box.
    """
    hidden, num_routers = partials.shape[1], len(desk.inboxes)
    return_kernel[(capacity,)](
        partials, job.source, job.numbers, job.num_tokens, job.job, boxes, flags, desk.words, desk.host_address,
        HIDDEN=hidden, PAD_H=triton.next_power_of_2(hidden), ROUTERS=num_routers,
        PAD_R=triton.next_power_of_2(num_routers), JOB=layout.JOB, RETURNED=layout.RETURNED, COUNTED=layout.COUNTED,
        NUM_COUNTS=layout.NUM_COUNTS, DONE=layout.DONE, ANSWERED=layout.ANSWERED, ENDED=layout.ENDED,
        NUMBERS=layout.NUMBERS, ROW_BITS=layout.ROW_BITS, num_warps=8,
    )  # fmt: skip

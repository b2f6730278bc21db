"""The bodies of the router's kernels: plan, put, wait, combine. kernels/p2p.py launches them and has their contracts.

Data that another device writes is read past the caches (.cv). A release at system scope by the last program, after a
barrier in every program and an acquire of all their counts, publishes what all of them wrote.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ep.kernels.quant import quantize_block


@triton.jit(do_not_specialize=["num_rows", "first_token", "layer_pos", "num_layers", "num_experts", "slots_per_shard",
                               "local_shard", "position_stride"])  # fmt: skip
def plan_kernel(
    topk_ids_ptr, replicas_ptr, num_replicas_ptr, slots_ptr, local_slots_ptr, position_ptr, counts_ptr, sent_ptr,
    is_sent_ptr, load_ptr, words_ptr, num_rows, first_token, layer_pos, num_layers, num_experts, slots_per_shard,
    local_shard, position_stride,
    TOP_K: tl.constexpr, PAD_K: tl.constexpr, REPLICAS: tl.constexpr, SHARDS: tl.constexpr, PAD_S: tl.constexpr,
    BLOCK_T: tl.constexpr, WINDOW: tl.constexpr, SCAN: tl.constexpr, SEQ: tl.constexpr, NUM_TOKENS: tl.constexpr,
    NUM_DECODE: tl.constexpr, PLANNED: tl.constexpr,
):  # fmt: skip
    """Slots of BLOCK_T tokens; the last program numbers the rows of each shard's message."""
    pid = tl.program_id(0)
    num_tokens = tl.minimum(tl.load(words_ptr + NUM_TOKENS) - first_token, num_rows)
    num_decode = tl.load(words_ptr + NUM_DECODE) - first_token
    lane = tl.arange(0, BLOCK_T * PAD_K)
    token, choice = pid * BLOCK_T + lane // PAD_K, lane % PAD_K
    is_row = (token < num_rows) & (choice < TOP_K)
    expert = tl.load(topk_ids_ptr + token * TOP_K + choice, mask=is_row & (token < num_tokens), other=-1)
    is_pair = (expert >= 0) & (expert < num_experts)
    key = layer_pos * num_experts + expert
    num_replicas = tl.load(num_replicas_ptr + key, mask=is_pair, other=1)
    # Its rank among its expert's pairs of this window of tokens; windows begin with another replica.
    window = (pid * BLOCK_T) // WINDOW
    rank = tl.full((BLOCK_T * PAD_K,), 0, tl.int32) + window
    if tl.max(num_replicas, 0) > 1:
        for first in range(window * WINDOW, (pid + 1) * BLOCK_T, BLOCK_T):
            other_token = first + lane // PAD_K
            is_other = (other_token < num_tokens) & (choice < TOP_K)
            other = tl.load(topk_ids_ptr + other_token * TOP_K + choice, mask=is_other, other=-2)
            is_earlier = (other_token * PAD_K + choice)[None, :] < (token * PAD_K + choice)[:, None]
            rank += tl.sum(((other[None, :] == expert[:, None]) & is_earlier).to(tl.int32), 1)
    replica = rank % num_replicas
    slot = tl.load(replicas_ptr + key * REPLICAS + replica, mask=is_pair, other=-1)
    tl.store(slots_ptr + token * TOP_K + choice, slot, mask=is_row)
    is_local = (slot >= 0) & (slot // slots_per_shard == local_shard)
    local_slot = tl.where(is_local, slot - local_shard * slots_per_shard, -1)
    tl.store(local_slots_ptr + token * TOP_K + choice, local_slot, mask=is_row)
    phase = tl.where(token < num_decode, num_layers * num_experts, 0)
    one = tl.full((BLOCK_T * PAD_K,), 1, tl.int64)
    tl.atomic_add(load_ptr + phase + key, one, mask=is_pair, sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(words_ptr + PLANNED, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(words_ptr + PLANNED, 0)
        shard = tl.arange(0, PAD_S)
        is_sent = tl.load(is_sent_ptr + shard, mask=shard < SHARDS, other=0)
        count = tl.zeros((PAD_S,), tl.int32)
        for start in range(0, num_rows, SCAN):
            at = start + tl.arange(0, SCAN)
            here = tl.zeros((SCAN, PAD_S), tl.int32)
            for k in tl.static_range(TOP_K):
                target = tl.load(slots_ptr + at * TOP_K + k, mask=at < num_tokens, other=-1, cache_modifier=".cg")
                owner = tl.where(target >= 0, target // slots_per_shard, -1)
                here = here | (owner[:, None] == shard[None, :]).to(tl.int32)
            here = here * is_sent[None, :]
            row = tl.cumsum(here, 0) - here + count[None, :]
            mask = (at < num_rows)[:, None] & (shard < SHARDS)[None, :]
            entry = position_ptr + shard[None, :] * position_stride + at[:, None]
            tl.store(entry, tl.where(here != 0, row, -1), mask=mask)
            count += tl.sum(here, 0)
        tl.store(counts_ptr + shard, count, mask=shard < SHARDS)
        rows = tl.load(sent_ptr + 2 * shard, mask=shard < SHARDS, other=0)
        tl.store(sent_ptr + 2 * shard, rows + count, mask=shard < SHARDS)
        messages = tl.load(sent_ptr + 2 * shard + 1, mask=shard < SHARDS, other=0)
        tl.store(sent_ptr + 2 * shard + 1, messages + (count > 0).to(tl.int64), mask=shard < SHARDS)
        tl.store(words_ptr + SEQ, tl.load(words_ptr + SEQ) + 1)


@triton.jit(do_not_specialize=["layer_pos", "slots_per_shard", "position_stride"])
def put_kernel(
    x_ptr, weights_ptr, slots_ptr, position_ptr, counts_ptr, inboxes_ptr, mailboxes_ptr, words_ptr, x_stride,
    layer_pos, slots_per_shard, position_stride, scales_offset, slot_ids_offset, weights_offset, header_offset,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, TOP_K: tl.constexpr, PAD_K: tl.constexpr,
    SHARDS: tl.constexpr, PAD_S: tl.constexpr, DTYPE: tl.constexpr, QUANTIZE: tl.constexpr, FP8_MAX: tl.constexpr,
    MIN_AMAX: tl.constexpr, SEQ: tl.constexpr, FAILED: tl.constexpr, SENT: tl.constexpr, GENERATION: tl.constexpr,
    TOKENS_AT: tl.constexpr, GENERATION_AT: tl.constexpr, LAYER_AT: tl.constexpr,
):  # fmt: skip
    """One program per token; the last one publishes: to the shard's device, then to its host.

    Everything is asked for at once, also what only the last program needs: one wait for memory instead of five.
    """
    token = tl.program_id(0).to(tl.int64)
    failed = tl.load(words_ptr + FAILED)
    shard = tl.arange(0, PAD_S)
    position = tl.load(position_ptr + shard * position_stride + token, mask=shard < SHARDS, other=-1)
    column = tl.arange(0, COLUMNS)
    offsets = column[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = offsets < HIDDEN
    x = tl.load(x_ptr + token * x_stride + offsets, mask=mask, other=0.0)
    choice = tl.arange(0, PAD_K)
    slot = tl.load(slots_ptr + token * TOP_K + choice, mask=choice < TOP_K, other=-1)
    weight = tl.load(weights_ptr + token * TOP_K + choice, mask=choice < TOP_K, other=0.0)
    inbox = tl.load(inboxes_ptr + shard, mask=shard < SHARDS, other=0)
    mailbox = tl.load(mailboxes_ptr + shard, mask=shard < SHARDS, other=0).to(tl.pointer_type(tl.int64))
    count = tl.load(counts_ptr + shard, mask=shard < SHARDS, other=0)
    header = tl.load(words_ptr + SEQ).to(tl.int64) & 0xFFFFFFFF
    header |= tl.load(words_ptr + GENERATION).to(tl.int64) << GENERATION_AT
    header |= (layer_pos.to(tl.int64) << LAYER_AT) | (count.to(tl.int64) << TOKENS_AT)
    if failed != 0:
        return
    if tl.max(position, 0) >= 0:
        if QUANTIZE:
            q, scale = quantize_block(x.to(tl.float32), FP8_MAX, MIN_AMAX)
            q = q.to(DTYPE)
        for one in range(SHARDS):
            row = tl.sum(tl.where(shard == one, position, 0), 0).to(tl.int64)
            if row >= 0:
                base = tl.sum(tl.where(shard == one, inbox, 0), 0)
                rows = tl.multiple_of(base.to(tl.pointer_type(DTYPE)), 16) + row * HIDDEN
                if QUANTIZE:
                    tl.store(rows + offsets, q, mask=mask)
                    scales = tl.multiple_of((base + scales_offset).to(tl.pointer_type(tl.float32)), 16)
                    tl.store(scales + row * (HIDDEN // GROUP) + column, scale, mask=column * GROUP < HIDDEN)
                else:
                    tl.store(rows + offsets, x, mask=mask)
                first_slot = one * slots_per_shard
                is_here = (slot >= first_slot) & (slot < first_slot + slots_per_shard)
                slot_ids = tl.multiple_of((base + slot_ids_offset).to(tl.pointer_type(tl.int32)), 16)
                here = tl.where(is_here, slot - first_slot, -1)
                tl.store(slot_ids + row * TOP_K + choice, here, mask=choice < TOP_K)
                weights = tl.multiple_of((base + weights_offset).to(tl.pointer_type(tl.float32)), 16)
                tl.store(weights + row * TOP_K + choice, weight, mask=choice < TOP_K)
    tl.debug_barrier()
    if tl.atomic_add(words_ptr + SENT, 1, sem="acq_rel", scope="sys") == tl.num_programs(0) - 1:
        place = (inbox + header_offset).to(tl.pointer_type(tl.int64))
        tl.atomic_xchg(place, header, mask=count > 0, sem="release", scope="sys")
        tl.atomic_xchg(mailbox, header, mask=count > 0, sem="relaxed", scope="sys")
        tl.store(words_ptr + SENT, 0)


@triton.jit(do_not_specialize=["host_address"])
def wait_kernel(
    counts_ptr, flags_ptr, words_ptr, host_address, SHARDS: tl.constexpr, PAD_S: tl.constexpr, LINE_WORDS: tl.constexpr,
    PATIENCE: tl.constexpr, SLOW: tl.constexpr, SEQ: tl.constexpr, STEP: tl.constexpr, FAILED: tl.constexpr,
    ABORT: tl.constexpr, FAILED_STEP: tl.constexpr, WAITING_SEQ: tl.constexpr, DONE_SEQ: tl.constexpr,
    LATE: tl.constexpr,
):  # fmt: skip
    """One program. It looks at host memory, which is far, once in PATIENCE polls."""
    if tl.load(words_ptr + FAILED) != 0:
        return
    host = host_address.to(tl.pointer_type(tl.int32))
    shard = tl.arange(0, PAD_S)
    is_awaited = tl.load(counts_ptr + shard, mask=shard < SHARDS, other=0) > 0
    seq = tl.load(words_ptr + SEQ)
    polls = 0
    missing = tl.max(is_awaited.to(tl.int32), 0)
    is_given_up = 0
    while missing != 0:
        flag = tl.load(flags_ptr + shard * LINE_WORDS, mask=is_awaited, other=0, volatile=True)
        is_late = is_awaited & (flag - seq < 0)
        missing = tl.max(is_late.to(tl.int32), 0)
        polls += 1
        if (missing != 0) & (polls % PATIENCE == 0):
            if tl.load(host + ABORT, volatile=True) != 0:
                tl.store(host + LATE + shard, is_late.to(tl.int32), mask=shard < SHARDS)
                tl.store(words_ptr + FAILED, 1)
                missing = 0
                is_given_up = 1
            if polls == SLOW:
                tl.atomic_xchg(host + WAITING_SEQ, seq, sem="release", scope="sys")
    if is_given_up != 0:
        tl.atomic_xchg(host + FAILED_STEP, tl.load(words_ptr + STEP), sem="release", scope="sys")
    if polls >= SLOW:
        tl.atomic_xchg(host + DONE_SEQ, seq, sem="release", scope="sys")


@triton.jit(do_not_specialize=["local_shard", "position_stride"])
def combine_kernel(
    partials_ptr, position_ptr, local_ptr, out_ptr, shard_stride, local_shard, position_stride, local_stride,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, SHARDS: tl.constexpr, PAD_S: tl.constexpr, HAS_LOCAL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < HIDDEN
    shard = tl.arange(0, PAD_S)
    position = tl.load(position_ptr + shard * position_stride + token, mask=shard < SHARDS, other=-1)
    total = tl.zeros((BLOCK,), tl.float32)
    for one in tl.static_range(SHARDS):
        row = tl.sum(tl.where(shard == one, position, 0), 0).to(tl.int64)
        source = partials_ptr + one * shard_stride + row * HIDDEN + column
        is_there = column < tl.where(row >= 0, HIDDEN, 0)
        total += tl.load(source, mask=is_there, other=0.0, cache_modifier=".cv").to(tl.float32)
        if HAS_LOCAL:
            is_here = column < tl.where(local_shard == one, HIDDEN, 0)
            total += tl.load(local_ptr + token * local_stride + column, mask=is_here, other=0.0)
    tl.store(out_ptr + token * HIDDEN + column, total.to(out_ptr.dtype.element_ty), mask=mask)

"""The bodies of the router's kernels: begin, dispatch, wait, combine. kernels/p2p.py launches them and has their
contracts.

Data that another device writes is read past the caches (.cv). A release at system scope, after a barrier of a program,
publishes what the program wrote.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ep.kernels.quant import quantize_block


@triton.jit
def _next_number(seq):
    """Not those whose flags look like memory that was never written."""
    following = seq + 1
    return following + ((following & 0x7FFFFFFF) == 0).to(tl.int32)


@triton.jit(do_not_specialize=["host_address", "num_tokens", "num_decode", "step", "begun"])
def begin_kernel(
    words_ptr, host_address, num_tokens, num_decode, step, begun, NUM_TOKENS: tl.constexpr, NUM_DECODE: tl.constexpr,
    STEP: tl.constexpr, BEGUN: tl.constexpr,
):  # fmt: skip
    """One program."""
    tl.store(words_ptr + NUM_TOKENS, num_tokens)
    tl.store(words_ptr + NUM_DECODE, num_decode)
    tl.store(words_ptr + STEP, step)
    if begun != 0:
        host = host_address.to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(host + BEGUN, begun, sem="relaxed", scope="sys")


@triton.jit(do_not_specialize=["num_rows", "first_token", "layer_pos", "num_layers", "num_experts", "slots_per_shard"])
def dispatch_kernel(
    x_ptr, topk_ids_ptr, weights_ptr, replicas_ptr, num_replicas_ptr, slots_ptr, owners_ptr, is_sent_ptr, load_ptr,
    inboxes_ptr, mailboxes_ptr, words_ptr, x_stride, num_rows, first_token, layer_pos, num_layers, num_experts,
    slots_per_shard, scales_offset, slot_ids_offset, weights_offset, flags_offset, header_offset, HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, TOP_K: tl.constexpr, PAD_K: tl.constexpr, REPLICAS: tl.constexpr,
    PAD_R: tl.constexpr, SHARDS: tl.constexpr, PAD_S: tl.constexpr, WINDOW: tl.constexpr, LOOK_BACK: tl.constexpr,
    DTYPE: tl.constexpr, QUANTIZE: tl.constexpr, FP8_MAX: tl.constexpr, MIN_AMAX: tl.constexpr, SEQ: tl.constexpr,
    SENT: tl.constexpr, NUM_TOKENS: tl.constexpr, NUM_DECODE: tl.constexpr, FAILED: tl.constexpr,
    GENERATION: tl.constexpr, TOKENS_AT: tl.constexpr, GENERATION_AT: tl.constexpr, LAYER_AT: tl.constexpr,
):  # fmt: skip
    """One program per token. Everything is asked for at once: one wait for memory instead of many."""
    token = tl.program_id(0)
    failed, seq = tl.load(words_ptr + FAILED), _next_number(tl.load(words_ptr + SEQ))
    generation = tl.load(words_ptr + GENERATION)
    num_tokens = tl.minimum(tl.load(words_ptr + NUM_TOKENS) - first_token, num_rows)
    num_decode = tl.load(words_ptr + NUM_DECODE) - first_token
    choice, shard, column = tl.arange(0, PAD_K), tl.arange(0, PAD_S), tl.arange(0, COLUMNS)
    is_choice = choice < TOP_K
    expert = tl.load(topk_ids_ptr + token * TOP_K + choice, mask=is_choice, other=-1)
    weight = tl.load(weights_ptr + token * TOP_K + choice, mask=is_choice, other=0.0)
    offsets = column[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = offsets < HIDDEN
    x = tl.load(x_ptr + token.to(tl.int64) * x_stride + offsets, mask=mask, other=0.0)
    inbox = tl.load(inboxes_ptr + shard, mask=shard < SHARDS, other=0)
    mailbox = tl.load(mailboxes_ptr + shard, mask=shard < SHARDS, other=0).to(tl.pointer_type(tl.int64))
    is_sent = tl.load(is_sent_ptr + shard, mask=shard < SHARDS, other=0)
    expert = tl.where(token < num_tokens, expert, -1)
    is_pair = is_choice & (expert >= 0) & (expert < num_experts)
    key = layer_pos * num_experts + expert
    num_replicas = tl.load(num_replicas_ptr + key, mask=is_pair, other=1)
    place = tl.arange(0, PAD_R)
    slots = tl.load(replicas_ptr + key[:, None] * REPLICAS + place[None, :],
                    mask=is_pair[:, None] & (place < REPLICAS)[None, :], other=-1)  # fmt: skip
    # Its rank among its expert's pairs of this window of tokens; windows begin with another replica.
    window = token // WINDOW
    rank = tl.full((PAD_K,), 0, tl.int32) + window
    if tl.max(num_replicas, 0) > 1:
        mine = token * TOP_K + choice
        for first in range(window * WINDOW * TOP_K, (token + 1) * TOP_K, LOOK_BACK):
            at = first + tl.arange(0, LOOK_BACK)
            other = tl.load(topk_ids_ptr + at, mask=at < (token + 1) * TOP_K, other=-2)
            is_same = (other[None, :] == expert[:, None]) & (at[None, :] < mine[:, None])
            rank += tl.sum(is_same.to(tl.int32), 1)
    is_chosen = place[None, :] == (rank % num_replicas)[:, None]
    slot = tl.where(is_pair, tl.sum(tl.where(is_chosen, slots, 0), 1), -1)
    tl.store(slots_ptr + token * TOP_K + choice, slot, mask=is_choice)
    owner = tl.where(slot >= 0, slot // slots_per_shard, -1)
    phase = tl.where(token < num_decode, num_layers * num_experts, 0)
    one = tl.full((PAD_K,), 1, tl.int64)
    tl.atomic_add(load_ptr + phase + key, one, mask=is_pair, sem="relaxed")
    here = tl.max((owner[:, None] == shard[None, :]).to(tl.int32), 0) * is_sent
    tl.store(owners_ptr + token, tl.sum(here.to(tl.int64) << shard.to(tl.int64), 0))
    if token == 0:
        tl.store(words_ptr + SENT, seq)
    if (failed != 0) | (token >= num_tokens):
        return
    header = (seq.to(tl.int64) & 0xFFFFFFFF) | (generation.to(tl.int64) << GENERATION_AT)
    header |= (layer_pos.to(tl.int64) << LAYER_AT) | (num_tokens.to(tl.int64) << TOKENS_AT)
    if token == 0:
        headers = tl.zeros((PAD_S,), tl.int64) + header
        ahead = (inbox + header_offset).to(tl.pointer_type(tl.int64))
        tl.atomic_xchg(ahead, headers, mask=is_sent != 0, sem="relaxed", scope="sys")
    if tl.max(here, 0) != 0:
        row = token.to(tl.int64)
        if QUANTIZE:
            q, scale = quantize_block(x.to(tl.float32), FP8_MAX, MIN_AMAX)
            q = q.to(DTYPE)
        for to in range(SHARDS):
            if tl.sum(tl.where(shard == to, here, 0), 0) != 0:
                base = tl.sum(tl.where(shard == to, inbox, 0), 0)
                rows = tl.multiple_of(base.to(tl.pointer_type(DTYPE)), 16) + row * HIDDEN
                if QUANTIZE:
                    tl.store(rows + offsets, q, mask=mask)
                    scales = tl.multiple_of((base + scales_offset).to(tl.pointer_type(tl.float32)), 16)
                    tl.store(scales + row * (HIDDEN // GROUP) + column, scale, mask=column * GROUP < HIDDEN)
                else:
                    tl.store(rows + offsets, x, mask=mask)
                slot_ids = tl.multiple_of((base + slot_ids_offset).to(tl.pointer_type(tl.int32)), 16)
                their_slot = tl.where(owner == to, slot - to * slots_per_shard, -1)
                tl.store(slot_ids + row * TOP_K + choice, their_slot, mask=is_choice)
                weights = tl.multiple_of((base + weights_offset).to(tl.pointer_type(tl.float32)), 16)
                tl.store(weights + row * TOP_K + choice, weight, mask=is_choice)
    tl.debug_barrier()
    flag = (inbox + flags_offset).to(tl.pointer_type(tl.int32)) + token
    tl.atomic_xchg(flag, (seq << 1) | here, mask=is_sent != 0, sem="release", scope="sys")
    if token == 0:  # last: a release waits for what was written before it, and host memory is far
        tl.atomic_xchg(mailbox, tl.zeros((PAD_S,), tl.int64) + header, mask=is_sent != 0, sem="relaxed", scope="sys")


@triton.jit
def _wait(
    owners_ptr, sent_ptr, flags_ptr, words_ptr, host_address, num_rows, first_token, flags_stride,
    SHARDS: tl.constexpr, PAD_S: tl.constexpr, BLOCK_T: tl.constexpr, PATIENCE: tl.constexpr, SLOW: tl.constexpr,
    SEQ: tl.constexpr, SENT: tl.constexpr, STEP: tl.constexpr, NUM_TOKENS: tl.constexpr, FAILED: tl.constexpr,
    ABORT: tl.constexpr, FAILED_STEP: tl.constexpr, WAITING_SEQ: tl.constexpr, DONE_SEQ: tl.constexpr,
    LATE: tl.constexpr,
):  # fmt: skip
    """For all rows. It looks at host memory, which is far, once in PATIENCE polls."""
    has_failed, seq = tl.load(words_ptr + FAILED), tl.load(words_ptr + SENT)
    num_tokens = tl.minimum(tl.load(words_ptr + NUM_TOKENS) - first_token, num_rows)
    host = host_address.to(tl.pointer_type(tl.int32))
    shard = tl.arange(0, PAD_S)
    sent = sent_ptr + 2 * shard
    sent_rows = tl.load(sent, mask=shard < SHARDS, other=0)
    sent_messages = tl.load(sent + 1, mask=shard < SHARDS, other=0)
    rows, late = tl.zeros((PAD_S,), tl.int64), tl.zeros((PAD_S,), tl.int32)
    polls, is_given_up = 0, has_failed
    for start in range(0, num_tokens, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        owners = tl.load(owners_ptr + token, mask=token < num_tokens, other=0)
        is_awaited = ((owners[:, None] >> shard[None, :].to(tl.int64)) & 1) != 0
        rows += tl.sum(is_awaited.to(tl.int64), 0)
        flags = flags_ptr + shard[None, :] * flags_stride + token[:, None]
        missing = 1 - has_failed
        while missing != 0:
            is_late = is_awaited & (tl.load(flags, mask=is_awaited, other=0, volatile=True) != seq)
            late_here = tl.max(is_late.to(tl.int32), 0)
            missing = tl.max(late_here, 0)
            polls += 1
            if (missing != 0) & (is_given_up == 0) & (polls % PATIENCE == 0):
                is_given_up = (tl.load(host + ABORT, volatile=True) != 0).to(tl.int32)
                if polls == SLOW:
                    tl.atomic_xchg(host + WAITING_SEQ, seq, sem="release", scope="sys")
            if is_given_up != 0:
                late = tl.maximum(late, late_here)
                missing = 0
    if (is_given_up != 0) & (has_failed == 0):
        tl.store(host + LATE + shard, late, mask=shard < SHARDS)
        tl.store(words_ptr + FAILED, 1)
        tl.debug_barrier()
        tl.atomic_xchg(host + FAILED_STEP, tl.load(words_ptr + STEP), sem="release", scope="sys")
    if polls >= SLOW:
        tl.atomic_xchg(host + DONE_SEQ, seq, sem="release", scope="sys")
    tl.store(words_ptr + SEQ, seq)
    tl.store(sent, sent_rows + rows, mask=shard < SHARDS)
    tl.store(sent + 1, sent_messages + (rows > 0).to(tl.int64), mask=shard < SHARDS)


@triton.jit
def _combine(
    token, column, owners, partials_ptr, out_ptr, shard_stride, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    SHARDS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK,), tl.float32)
    for one in tl.static_range(SHARDS):
        source = partials_ptr + one * shard_stride + token * HIDDEN + column
        is_there = column < tl.where(((owners >> one) & 1) != 0, HIDDEN, 0)
        total += tl.load(source, mask=is_there, other=0.0, cache_modifier=".cv").to(tl.float32)
    tl.store(out_ptr + token * HIDDEN + column, total.to(out_ptr.dtype.element_ty), mask=column < HIDDEN)


@triton.jit(do_not_specialize=["host_address", "num_rows", "first_token", "flags_stride"])
def wait_kernel(
    owners_ptr, sent_ptr, flags_ptr, words_ptr, host_address, num_rows, first_token, flags_stride,
    SHARDS: tl.constexpr, PAD_S: tl.constexpr, BLOCK_T: tl.constexpr, PATIENCE: tl.constexpr, SLOW: tl.constexpr,
    SEQ: tl.constexpr, SENT: tl.constexpr, STEP: tl.constexpr, NUM_TOKENS: tl.constexpr, FAILED: tl.constexpr,
    ABORT: tl.constexpr, FAILED_STEP: tl.constexpr, WAITING_SEQ: tl.constexpr, DONE_SEQ: tl.constexpr,
    LATE: tl.constexpr,
):  # fmt: skip
    """One program."""
    _wait(owners_ptr, sent_ptr, flags_ptr, words_ptr, host_address, num_rows, first_token, flags_stride, SHARDS, PAD_S,
          BLOCK_T, PATIENCE, SLOW, SEQ, SENT, STEP, NUM_TOKENS, FAILED, ABORT, FAILED_STEP, WAITING_SEQ, DONE_SEQ,
          LATE)  # fmt: skip


@triton.jit
def combine_kernel(
    partials_ptr, owners_ptr, out_ptr, shard_stride, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, SHARDS: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    owners = tl.load(owners_ptr + token)
    _combine(token, column, owners, partials_ptr, out_ptr, shard_stride, HIDDEN, BLOCK, SHARDS)


@triton.jit(do_not_specialize=["host_address", "num_rows", "first_token", "flags_stride"])
def wait_and_combine_kernel(
    partials_ptr, owners_ptr, out_ptr, shard_stride, sent_ptr, flags_ptr, words_ptr, host_address, num_rows,
    first_token, flags_stride,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, SHARDS: tl.constexpr, PAD_S: tl.constexpr, BLOCK_T: tl.constexpr,
    PATIENCE: tl.constexpr, SLOW: tl.constexpr, SEQ: tl.constexpr, SENT: tl.constexpr, STEP: tl.constexpr,
    NUM_TOKENS: tl.constexpr, FAILED: tl.constexpr, ABORT: tl.constexpr, FAILED_STEP: tl.constexpr,
    WAITING_SEQ: tl.constexpr, DONE_SEQ: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """The first program waits for all rows and says if it gives up; the others each for their row, or for that word."""
    row, part = tl.program_id(0), tl.program_id(1)
    if row == 0:
        if part == 0:
            _wait(owners_ptr, sent_ptr, flags_ptr, words_ptr, host_address, num_rows, first_token, flags_stride,
                  SHARDS, PAD_S, BLOCK_T, PATIENCE, SLOW, SEQ, SENT, STEP, NUM_TOKENS, FAILED, ABORT, FAILED_STEP,
                  WAITING_SEQ, DONE_SEQ, LATE)  # fmt: skip
    else:
        token = (row - 1).to(tl.int64)
        column = part * BLOCK + tl.arange(0, BLOCK)
        shard = tl.arange(0, PAD_S)
        has_failed, seq, owners = tl.load(words_ptr + FAILED), tl.load(words_ptr + SENT), tl.load(owners_ptr + token)
        is_awaited = ((owners >> shard.to(tl.int64)) & 1) != 0
        flags = flags_ptr + shard * flags_stride + token
        missing, polls = 1 - has_failed, 0
        while missing != 0:
            flag = tl.atomic_add(flags, tl.zeros((PAD_S,), tl.int32), mask=is_awaited, sem="acquire", scope="sys")
            missing = tl.max((is_awaited & (flag != seq)).to(tl.int32), 0)
            polls += 1
            if (missing != 0) & (polls % PATIENCE == 0):
                missing = (tl.load(words_ptr + FAILED, volatile=True) == 0).to(tl.int32)
        tl.debug_barrier()
        _combine(token, column, owners, partials_ptr, out_ptr, shard_stride, HIDDEN, BLOCK, SHARDS)

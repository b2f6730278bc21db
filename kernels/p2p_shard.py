"""The bodies of the shard's kernels: collect and return. kernels/p2p.py launches them and has their contracts."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _find(job_ptr, row, JOB_ROUTERS: tl.constexpr, JOINED: tl.constexpr):
    """(router or -1, row of its message) that a row of the job is."""
    entry = tl.arange(0, JOINED)
    router = tl.load(job_ptr + JOB_ROUTERS + entry)
    first = tl.load(job_ptr + JOB_ROUTERS + JOINED + entry)
    count = tl.load(job_ptr + JOB_ROUTERS + 2 * JOINED + entry)
    end = tl.cumsum(count, 0)
    is_mine = (row < end) & (row >= end - count)
    found = tl.max(tl.where(is_mine, router, -1), 0)
    return found, tl.sum(tl.where(is_mine, first + row - (end - count), 0), 0)


@triton.jit(do_not_specialize=["ring_address", "ring_size"])
def collect_kernel(
    ring_address, inboxes_ptr, words_ptr, rows_ptr, scales_ptr, slot_ids_ptr, weights_ptr, job_ptr, layer_idx_ptr,
    num_tokens_ptr, ring_size, scales_offset, slot_ids_offset, weights_offset,
    HIDDEN: tl.constexpr, PAD_H: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, TOP_K: tl.constexpr,
    PAD_K: tl.constexpr, QUANTIZED: tl.constexpr, JOINED: tl.constexpr, WORDS: tl.constexpr, JOB: tl.constexpr,
    JOB_TOKENS: tl.constexpr, JOB_LAYER: tl.constexpr, JOB_ROUTERS: tl.constexpr,
):  # fmt: skip
    """One program per row of the capacity."""
    row = tl.program_id(0)
    ring = ring_address.to(tl.pointer_type(tl.int32))
    given = ring + (tl.load(words_ptr + JOB) & (ring_size - 1)) * WORDS
    if row == 0:
        word = tl.arange(0, WORDS)
        tl.store(job_ptr + word, tl.load(given + word))
        tl.store(layer_idx_ptr, tl.load(given + JOB_LAYER))
        tl.store(num_tokens_ptr, tl.load(given + JOB_TOKENS))
    router, theirs = _find(given, row, JOB_ROUTERS, JOINED)
    if router < 0:
        return
    base = tl.load(inboxes_ptr + router)
    ours, theirs = row.to(tl.int64), theirs.to(tl.int64)
    column = tl.arange(0, PAD_H)
    source = tl.multiple_of(base.to(tl.pointer_type(rows_ptr.dtype.element_ty)), 16) + theirs * HIDDEN
    values = tl.load(source + column, mask=column < HIDDEN, cache_modifier=".cv")
    tl.store(rows_ptr + ours * HIDDEN + column, values, mask=column < HIDDEN)
    if QUANTIZED:
        block = tl.arange(0, COLUMNS)
        mask = block < HIDDEN // GROUP
        scales = tl.multiple_of((base + scales_offset).to(tl.pointer_type(tl.float32)), 16)
        scale = tl.load(scales + theirs * (HIDDEN // GROUP) + block, mask=mask, cache_modifier=".cv")
        tl.store(scales_ptr + ours * (HIDDEN // GROUP) + block, scale, mask=mask)
    choice = tl.arange(0, PAD_K)
    mask = choice < TOP_K
    slot_ids = tl.multiple_of((base + slot_ids_offset).to(tl.pointer_type(tl.int32)), 16)
    slot = tl.load(slot_ids + theirs * TOP_K + choice, mask=mask, cache_modifier=".cv")
    tl.store(slot_ids_ptr + ours * TOP_K + choice, slot, mask=mask)
    weights = tl.multiple_of((base + weights_offset).to(tl.pointer_type(tl.float32)), 16)
    weight = tl.load(weights + theirs * TOP_K + choice, mask=mask, cache_modifier=".cv")
    tl.store(weights_ptr + ours * TOP_K + choice, weight, mask=mask)


@triton.jit(do_not_specialize=["done_address"])
def return_kernel(
    partials_ptr, job_ptr, boxes_ptr, flags_ptr, words_ptr, done_address,
    HIDDEN: tl.constexpr, PAD_H: tl.constexpr, JOINED: tl.constexpr, JOB: tl.constexpr, RETURNED: tl.constexpr,
    JOB_ROUTERS: tl.constexpr,
):  # fmt: skip
    """One program per row of the capacity; the last one raises the flags and says in host memory that the job is
    done."""
    row = tl.program_id(0)
    router, theirs = _find(job_ptr, row, JOB_ROUTERS, JOINED)
    if router >= 0:
        column = tl.arange(0, PAD_H)
        ours = row.to(tl.int64)
        values = tl.load(partials_ptr + ours * HIDDEN + column, mask=column < HIDDEN)
        box = tl.load(boxes_ptr + router).to(tl.pointer_type(partials_ptr.dtype.element_ty))
        box = tl.multiple_of(box, 16)
        tl.store(box + theirs.to(tl.int64) * HIDDEN + column, values, mask=column < HIDDEN)
    tl.debug_barrier()
    if tl.atomic_add(words_ptr + RETURNED, 1, sem="acq_rel", scope="sys") == tl.num_programs(0) - 1:
        tl.store(words_ptr + RETURNED, 0)
        entry = tl.arange(0, JOINED)
        asker = tl.load(job_ptr + JOB_ROUTERS + entry)
        seq = tl.load(job_ptr + JOB_ROUTERS + 3 * JOINED + entry)
        is_last = (tl.load(job_ptr + JOB_ROUTERS + 4 * JOINED + entry) != 0) & (asker >= 0)
        flag = tl.load(flags_ptr + asker, mask=is_last, other=0).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(flag, seq, mask=is_last, sem="release", scope="sys")
        done = tl.load(words_ptr + JOB) + 1
        tl.store(words_ptr + JOB, done)
        tl.atomic_xchg(done_address.to(tl.pointer_type(tl.int32)), done, sem="release", scope="sys")

"""The bodies of the shard's kernels: take, collect and return. kernels/p2p.py launches them and has their contracts."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _waiting(header, is_here, done_seq, served, max_tokens, num_layers, TOKENS_AT: tl.constexpr,
             GENERATION_AT: tl.constexpr, LAYER_AT: tl.constexpr, MAX_TOKENS: tl.constexpr,
             GENERATIONS: tl.constexpr, LAYERS: tl.constexpr):  # fmt: skip
    """Of every router: whether it has a message that is to be answered, its number, tokens and layer."""
    seq = header.to(tl.int32)
    count = ((header >> TOKENS_AT) & (MAX_TOKENS - 1)).to(tl.int32)
    generation = ((header >> GENERATION_AT) & (GENERATIONS - 1)).to(tl.int32)
    layer = ((header >> LAYER_AT) & (LAYERS - 1)).to(tl.int32)
    is_served = tl.max((generation[:, None] == served[None, :]).to(tl.int32), 1) != 0
    is_new = is_here & (count > 0) & (seq != done_seq)
    return is_new & is_served & (count <= max_tokens) & (layer < num_layers), seq, count, layer


@triton.jit
def _lead(is_waiting, layer, count, turn, PAD_R: tl.constexpr):
    """The router whose turn it is, as a mask, and its layer and tokens."""
    turn = tl.where(is_waiting, turn, PAD_R)
    is_lead = is_waiting & (turn == tl.min(turn, 0))
    return is_lead, tl.sum(tl.where(is_lead, layer, 0), 0), tl.sum(tl.where(is_lead, count, 0), 0)


@triton.jit
def _missing(is_here, is_waiting, expected, lead_layer, lead_count, JOIN_ROWS: tl.constexpr):
    """1 for every router that is worth waiting for: it is likely to ask for this layer next."""
    is_expected = is_here & (expected == lead_layer) & (lead_count <= JOIN_ROWS)
    return tl.where(is_expected, 1 - is_waiting.to(tl.int32), 0)


@triton.jit(do_not_specialize=["host_address", "capacity", "max_tokens", "num_layers", "patience", "window"])
def take_kernel(
    inboxes_ptr, served_ptr, taken_ptr, words_ptr, host_address, job_ptr, layer_idx_ptr, num_tokens_ptr, header_offset,
    capacity, max_tokens, num_layers, patience, window,
    ROUTERS: tl.constexpr, PAD_R: tl.constexpr, SERVED: tl.constexpr, LOOK: tl.constexpr, PARTS: tl.constexpr,
    COLUMNS: tl.constexpr, FIRST_LAYER: tl.constexpr, JOIN_ROWS: tl.constexpr, NEXT: tl.constexpr, IDLE: tl.constexpr,
    COUNTED: tl.constexpr, STOP: tl.constexpr, JOB_TOKENS: tl.constexpr, JOB_LAYER: tl.constexpr,
    JOB_ROUTERS: tl.constexpr, TOKENS_AT: tl.constexpr, GENERATION_AT: tl.constexpr, LAYER_AT: tl.constexpr,
    MAX_TOKENS: tl.constexpr, GENERATIONS: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    """One program. It looks at host memory, which is far, once in LOOK polls."""
    router = tl.arange(0, PAD_R)
    inbox = tl.load(inboxes_ptr + router, mask=router < ROUTERS, other=0)
    is_here = inbox != 0
    place = (inbox + header_offset).to(tl.pointer_type(tl.int64))
    taken = taken_ptr + COLUMNS * router
    done_seq = tl.load(taken, mask=is_here, other=0)
    part_seq = tl.load(taken + 1, mask=is_here, other=0)
    part_rows = tl.load(taken + 2, mask=is_here, other=0)
    expected = tl.load(taken + 3, mask=is_here, other=-1)
    served = tl.load(served_ptr + tl.arange(0, SERVED))
    turn = (router - tl.load(words_ptr + NEXT) + ROUTERS) % ROUTERS
    counted = words_ptr + COUNTED
    jobs, messages = tl.load(counted), tl.load(counted + 1)
    joined, tokens = tl.load(counted + 2), tl.load(counted + 3)
    host = host_address.to(tl.pointer_type(tl.int32))
    limit = tl.where(tl.load(words_ptr + IDLE) != 0, 1, tl.maximum(patience, 1))
    polls, waited, go_on = 0, 0, 1
    header = tl.load(place, mask=is_here, other=0, volatile=True)
    while go_on != 0:
        is_waiting, _, count, layer = _waiting(header, is_here, done_seq, served, max_tokens, num_layers, TOKENS_AT,
                                               GENERATION_AT, LAYER_AT, MAX_TOKENS, GENERATIONS, LAYERS)  # fmt: skip
        found = tl.max(is_waiting.to(tl.int32), 0)
        _, lead_layer, lead_count = _lead(is_waiting, layer, count, turn, PAD_R)
        missing = tl.max(_missing(is_here, is_waiting, expected, lead_layer, lead_count, JOIN_ROWS), 0)
        most = window * tl.where(lead_layer == 0, FIRST_LAYER, 1)
        for_others = ((missing != 0) & (waited < most)).to(tl.int32)
        go_on = tl.where(found != 0, for_others, (polls + 1 < limit).to(tl.int32))
        waited += found
        polls += 1 - found
        if (go_on != 0) & ((polls + waited) % LOOK == 0):
            go_on = (tl.load(host + STOP, volatile=True) == 0).to(tl.int32)
        if go_on != 0:
            header = tl.load(place, mask=is_here, other=0, volatile=True)
    is_waiting, seq, count, layer = _waiting(header, is_here, done_seq, served, max_tokens, num_layers, TOKENS_AT,
                                             GENERATION_AT, LAYER_AT, MAX_TOKENS, GENERATIONS, LAYERS)  # fmt: skip
    found = tl.max(is_waiting.to(tl.int32), 0)
    nothing = tl.zeros((PAD_R,), tl.int64)
    tl.atomic_add(place, nothing, mask=is_waiting, sem="acquire", scope="sys")
    # The router whose turn it is, then all that ask for the same layer.
    is_lead, lead_layer, lead_count = _lead(is_waiting, layer, count, turn, PAD_R)
    first = tl.where(part_seq == seq, part_rows, 0)
    left = tl.where(is_waiting & (layer == lead_layer), count - first, 0)
    lead_rows = tl.minimum(tl.sum(tl.where(is_lead, left, 0), 0), capacity)
    others = tl.where(is_lead, 0, left)
    rank = tl.cumsum((others > 0).to(tl.int32), 0)
    room = capacity - lead_rows - (tl.cumsum(others, 0) - others)
    rows = tl.where(rank < PARTS, tl.minimum(tl.maximum(room, 0), others), 0)
    rows = tl.where(is_lead, lead_rows, rows)
    is_part = rows > 0
    is_last = is_part & (first + rows == count)
    entry = job_ptr + JOB_ROUTERS + tl.arange(0, PARTS)
    zeros = tl.zeros((PARTS,), tl.int32)
    tl.store(entry, zeros - 1)
    tl.store(entry + 2 * PARTS, zeros)
    tl.store(entry + 4 * PARTS, zeros)
    tl.debug_barrier()
    mine = job_ptr + JOB_ROUTERS + tl.where(is_lead, 0, rank)
    tl.store(mine, router, mask=is_part)
    tl.store(mine + PARTS, first, mask=is_part)
    tl.store(mine + 2 * PARTS, rows, mask=is_part)
    tl.store(mine + 3 * PARTS, seq, mask=is_part)
    tl.store(mine + 4 * PARTS, is_last.to(tl.int32), mask=is_part)
    total, parts = tl.sum(rows, 0), tl.sum(is_part.to(tl.int32), 0)
    tl.store(job_ptr + JOB_TOKENS, total)
    tl.store(job_ptr + JOB_LAYER, lead_layer)
    tl.store(layer_idx_ptr, lead_layer)
    tl.store(num_tokens_ptr, total)
    tl.store(taken, seq, mask=is_last)
    tl.store(taken + 1, seq, mask=is_part)
    tl.store(taken + 2, first + rows, mask=is_part)
    # Who was waited for in vain is not waited for again before its next message.
    missing = _missing(is_here, is_waiting, expected, lead_layer, lead_count, JOIN_ROWS) * found
    tl.store(taken + 3, tl.zeros((PAD_R,), tl.int32) - 1, mask=missing != 0)
    tl.store(taken + 3, tl.where(count <= JOIN_ROWS, (layer + 1) % num_layers, -1), mask=is_last)
    lead = tl.sum(tl.where(is_lead, router + 1, 0), 0)
    if found != 0:
        tl.store(words_ptr + NEXT, lead % ROUTERS)
    tl.store(words_ptr + IDLE, 1 - found)
    tl.store(counted, jobs + found)
    tl.store(counted + 1, messages + tl.sum(is_last.to(tl.int32), 0))
    tl.store(counted + 2, joined + tl.where(parts > 1, parts, 0))
    tl.store(counted + 3, tokens + total)


@triton.jit
def _find(job_ptr, row, JOB_ROUTERS: tl.constexpr, PARTS: tl.constexpr):
    """(router or -1, row of its message) that a row of the job is."""
    entry = tl.arange(0, PARTS)
    router = tl.load(job_ptr + JOB_ROUTERS + entry)
    first = tl.load(job_ptr + JOB_ROUTERS + PARTS + entry)
    count = tl.load(job_ptr + JOB_ROUTERS + 2 * PARTS + entry)
    end = tl.cumsum(count, 0)
    is_mine = (row < end) & (row >= end - count)
    found = tl.max(tl.where(is_mine, router, -1), 0)
    return found, tl.sum(tl.where(is_mine, first + row - (end - count), 0), 0)


@triton.jit
def collect_kernel(
    job_ptr, inboxes_ptr, rows_ptr, scales_ptr, slot_ids_ptr, weights_ptr, scales_offset, slot_ids_offset,
    weights_offset,
    HIDDEN: tl.constexpr, PAD_H: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, TOP_K: tl.constexpr,
    PAD_K: tl.constexpr, QUANTIZED: tl.constexpr, PARTS: tl.constexpr, JOB_ROUTERS: tl.constexpr,
):  # fmt: skip
    """One program per row of the capacity."""
    row = tl.program_id(0)
    router, theirs = _find(job_ptr, row, JOB_ROUTERS, PARTS)
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


@triton.jit(do_not_specialize=["host_address"])
def return_kernel(
    partials_ptr, job_ptr, boxes_ptr, flags_ptr, words_ptr, host_address,
    HIDDEN: tl.constexpr, PAD_H: tl.constexpr, PARTS: tl.constexpr, JOB: tl.constexpr, RETURNED: tl.constexpr,
    COUNTED: tl.constexpr, NUM_COUNTS: tl.constexpr, DONE: tl.constexpr, ANSWERED: tl.constexpr,
    JOB_ROUTERS: tl.constexpr,
):  # fmt: skip
    """One program per row of the capacity; the last one raises the flags and says in host memory what is done.

    Everything is asked for at once, also what only the last program needs.
    """
    row = tl.program_id(0)
    column = tl.arange(0, PAD_H)
    values = tl.load(partials_ptr + row.to(tl.int64) * HIDDEN + column, mask=column < HIDDEN)
    router, theirs = _find(job_ptr, row, JOB_ROUTERS, PARTS)
    entry, count = tl.arange(0, PARTS), tl.arange(0, NUM_COUNTS)
    asker = tl.load(job_ptr + JOB_ROUTERS + entry)
    seq = tl.load(job_ptr + JOB_ROUTERS + 3 * PARTS + entry)
    is_last = (tl.load(job_ptr + JOB_ROUTERS + 4 * PARTS + entry) != 0) & (asker >= 0)
    flag = tl.load(flags_ptr + asker, mask=is_last, other=0).to(tl.pointer_type(tl.int32))
    counted = tl.load(words_ptr + COUNTED + count)
    done = tl.load(words_ptr + JOB) + 1
    if router >= 0:
        box = tl.load(boxes_ptr + router).to(tl.pointer_type(partials_ptr.dtype.element_ty))
        box = tl.multiple_of(box, 16)
        tl.store(box + theirs.to(tl.int64) * HIDDEN + column, values, mask=column < HIDDEN)
    tl.debug_barrier()
    if tl.atomic_add(words_ptr + RETURNED, 1, sem="acq_rel", scope="sys") == tl.num_programs(0) - 1:
        tl.atomic_xchg(flag, seq, mask=is_last, sem="release", scope="sys")
        tl.store(words_ptr + RETURNED, 0)
        tl.store(words_ptr + JOB, done)
        host = host_address.to(tl.pointer_type(tl.int32))
        tl.store(host + ANSWERED + asker, seq, mask=is_last)
        tl.store(host + DONE + 1 + count, counted)
        tl.debug_barrier()
        tl.atomic_xchg(host + DONE, done, sem="release", scope="sys")

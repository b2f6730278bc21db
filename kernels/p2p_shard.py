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
def _fits(count, capacity, largest, likely, LIKELY_UNIT: tl.constexpr):
    """Whether messages of so many tokens are not to be left to a larger job."""
    rows = tl.minimum((count * likely + LIKELY_UNIT - 1) // LIKELY_UNIT + 1, count)
    return (rows <= 2 * capacity) | (capacity >= largest)


@triton.jit
def _lead(is_here, has_asked, is_waiting, layer, count, expected, turn, num_layers, PAD_R: tl.constexpr,
          JOIN_ROWS: tl.constexpr):  # fmt: skip
    """The router that is to be answered next, as a mask, and its layer; 1 for every router that it is held for: who has
    not asked yet, is likely to ask for this layer or for one before it, and would rather be met than followed; how many
    tokens both have then."""
    is_small = count <= JOIN_ROWS
    position = tl.where(has_asked, tl.where(is_small, layer, -1), tl.where(is_here, expected, -1))
    lag = layer[:, None] - position[None, :]
    lag = tl.where(lag < 0, lag + num_layers, lag)
    is_near = (position[None, :] >= 0) & (2 * lag < num_layers) & (is_waiting & is_small)[:, None]
    is_behind = (is_near & ((lag > 0) | (has_asked[None, :] == 0))).to(tl.int32)
    is_free = (is_waiting & (tl.max(is_behind, 1) == 0)).to(tl.int32)
    turn = tl.where((is_free != 0) | (is_waiting & (tl.max(is_free, 0) == 0)), turn, PAD_R)
    is_lead = is_waiting & (turn == tl.min(turn, 0))
    missing = tl.max(tl.where(is_lead[:, None] & (has_asked[None, :] == 0), is_behind, 0), 0)
    common = tl.minimum(tl.sum(tl.where(is_lead, count, 0), 0), tl.max(tl.where(missing != 0, count, 0), 0))
    return is_lead, tl.sum(tl.where(is_lead, layer, 0), 0), missing, common


@triton.jit(do_not_specialize=["host_address", "capacity", "largest", "likely", "max_tokens", "num_layers", "patience",
                               "window", "whole_rows"])  # fmt: skip
def take_kernel(
    inboxes_ptr, served_ptr, taken_ptr, words_ptr, host_address, source_ptr, numbers_ptr, job_ptr, layer_idx_ptr,
    num_tokens_ptr, flags_offset, header_offset, capacity, largest, likely, max_tokens, num_layers, patience,
    window, whole_rows,
    ROUTERS: tl.constexpr, PAD_R: tl.constexpr, SERVED: tl.constexpr, LOOK: tl.constexpr,
    LIKELY_UNIT: tl.constexpr, FLAG_LOOKS: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, CREDIT: tl.constexpr, WORTH: tl.constexpr, RETRY: tl.constexpr,
    JOIN_ROWS: tl.constexpr, NEXT: tl.constexpr, DEBT: tl.constexpr, IDLE: tl.constexpr, COUNTED: tl.constexpr,
    STOP: tl.constexpr, JOB_LAYER: tl.constexpr, ENDED: tl.constexpr, NUMBERS: tl.constexpr, ROW_BITS: tl.constexpr,
    TOKENS_AT: tl.constexpr, GENERATION_AT: tl.constexpr, LAYER_AT: tl.constexpr, MAX_TOKENS: tl.constexpr,
    GENERATIONS: tl.constexpr, LAYERS: tl.constexpr,
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
    debt, credit = tl.load(words_ptr + DEBT), CREDIT * window * (num_layers + 2)
    half = tl.where(2 * debt <= credit, credit // 2, 0)
    polls, waited, go_on, too_large = 0, 0, 1, 0
    header = tl.load(place, mask=is_here, other=0, volatile=True)
    while go_on != 0:
        has_asked, _, count, layer = _waiting(header, is_here, done_seq, served, max_tokens, num_layers, TOKENS_AT,
                                              GENERATION_AT, LAYER_AT, MAX_TOKENS, GENERATIONS, LAYERS)  # fmt: skip
        is_waiting = has_asked & _fits(count, capacity, largest, likely, LIKELY_UNIT)
        found = tl.max(is_waiting.to(tl.int32), 0)
        too_large = tl.max(has_asked.to(tl.int32), 0) - found
        _, _, missing, common = _lead(is_here, has_asked, is_waiting, layer, count, expected, turn, num_layers, PAD_R,
                                      JOIN_ROWS)  # fmt: skip
        most = half * tl.minimum(WORTH * common, whole_rows) // whole_rows
        for_others = ((tl.max(missing, 0) != 0) & (waited < most)).to(tl.int32)
        go_on = tl.where(found != 0, for_others, ((polls + 1 < limit) & (too_large == 0)).to(tl.int32))
        waited += for_others
        polls += 1 - found
        if (go_on != 0) & ((polls + waited) % LOOK == 0):
            go_on = (tl.load(host + STOP, volatile=True) == 0).to(tl.int32)
        if go_on != 0:
            header = tl.load(place, mask=is_here, other=0, volatile=True)
    has_asked, seq, count, layer = _waiting(header, is_here, done_seq, served, max_tokens, num_layers, TOKENS_AT,
                                            GENERATION_AT, LAYER_AT, MAX_TOKENS, GENERATIONS, LAYERS)  # fmt: skip
    is_waiting = has_asked & _fits(count, capacity, largest, likely, LIKELY_UNIT)
    # The router whose turn it is, then all that ask for the same layer.
    is_lead, lead_layer, missing, _ = _lead(is_here, has_asked, is_waiting, layer, count, expected, turn, num_layers,
                                            PAD_R, JOIN_ROWS)  # fmt: skip
    lead = tl.sum(tl.where(is_lead, router, 0), 0)
    is_asking = tl.where(is_waiting & (layer == lead_layer), 1, 0)
    skipped = tl.where(part_seq == seq, part_rows, 0)
    total, parts = 0, 0
    rows, is_part, is_last = tl.zeros((PAD_R,), tl.int32), tl.zeros((PAD_R,), tl.int32), tl.zeros((PAD_R,), tl.int32)
    answered, gone_on = 0, 0
    for offset in range(ROUTERS):
        one = (lead + offset) % ROUTERS
        is_one = router == one
        if (tl.sum(tl.where(is_one, is_asking, 0), 0) != 0) & (total < capacity):
            base = tl.sum(tl.where(is_one, inbox, 0), 0)
            number = tl.sum(tl.where(is_one, seq, 0), 0)
            length = tl.sum(tl.where(is_one, count, 0), 0)
            skip = tl.sum(tl.where(is_one, skipped, 0), 0)
            flags = (base + flags_offset).to(tl.pointer_type(tl.int32))
            newest = (base + header_offset).to(tl.pointer_type(tl.int64))
            # Its rows are under way. It is gone if they do not come; it may go on where none of them is for this shard.
            # What the last look stores is right.
            late, looks, is_whole, seen = 1, 0, 1, 0
            while late != 0:
                late, seen = 0, 0
                for start in range(0, length, BLOCK):
                    at = start + tl.arange(0, BLOCK)
                    flag = tl.load(flags + at, mask=at < length, other=0, volatile=True)
                    is_late = (at < length) & ((flag | 1) != ((number << 1) | 1))
                    late = tl.maximum(late, tl.max(is_late.to(tl.int32), 0))
                    is_row = ((flag == ((number << 1) | 1)) & (at < length)).to(tl.int32)
                    rank = seen + tl.cumsum(is_row, 0) - is_row - skip
                    is_mine = (is_row != 0) & (rank >= 0) & (rank < capacity - total)
                    tl.store(source_ptr + total + rank, (one << ROW_BITS) | at, mask=is_mine)
                    tl.store(numbers_ptr + total + rank, number + tl.zeros((BLOCK,), tl.int32), mask=is_mine)
                    seen += tl.sum(is_row, 0)
                looks += 1
                if late != 0:
                    has_gone_on = tl.load(newest, volatile=True).to(tl.int32) != number
                    if has_gone_on | (looks >= FLAG_LOOKS):
                        late = 0
                        is_whole = 0
                    gone_on += has_gone_on.to(tl.int32)
            if is_whole != 0:
                mine = tl.minimum(seen - skip, capacity - total)
                rows = tl.where(is_one, mine, rows)
                is_part = tl.where(is_one, 1, is_part)
                is_last = tl.where(is_one & (skip + mine == seen), 1, is_last)
                answered += ((seen > 0) & (skip + mine == seen)).to(tl.int32)
                total += mine
                parts += (mine > 0).to(tl.int32)
    # Between the flags that were seen and the rows that they are for.
    tl.atomic_add(place, tl.zeros((PAD_R,), tl.int64), mask=is_part != 0, sem="acquire", scope="sys")
    # Whoever has gone on has another message, which the next job finds, as it does what is too large for this one.
    met = tl.maximum(tl.max(is_part, 0), tl.minimum(gone_on, 1))
    found = tl.maximum(met, too_large)
    tl.store(job_ptr + JOB_LAYER, lead_layer)
    tl.store(job_ptr + ENDED + router, is_last)
    tl.store(job_ptr + NUMBERS + router, seq)
    tl.store(layer_idx_ptr, lead_layer)
    tl.store(num_tokens_ptr, total)
    tl.store(taken, seq, mask=is_last != 0)
    tl.store(taken + 1, seq, mask=is_part != 0)
    tl.store(taken + 2, skipped + rows, mask=is_part != 0)
    # Who was waited for in vain is not waited for again before its next message.
    tl.store(taken + 3, tl.zeros((PAD_R,), tl.int32) - 1, mask=missing * met != 0)
    tl.store(taken + 3, tl.where(count <= JOIN_ROWS, (layer + 1) % num_layers, -1), mask=is_last != 0)
    if tl.max(is_lead.to(tl.int32), 0) != 0:  # also past one whose rows did not come
        tl.store(words_ptr + NEXT, (lead + 1) % ROUTERS)
    saved = window * tl.minimum(2 * rows, whole_rows) // whole_rows
    earned = tl.sum(saved, 0) - tl.max(saved, 0) + (tl.max(saved, 0) + RETRY - 1) // RETRY
    tl.store(words_ptr + DEBT, tl.maximum(debt + waited - earned, 0))
    tl.store(words_ptr + IDLE, 1 - found)
    tl.store(counted, jobs + found)
    tl.store(counted + 1, messages + answered)
    tl.store(counted + 2, joined + tl.where(parts > 1, parts, 0))
    tl.store(counted + 3, tokens + total)


@triton.jit
def collect_kernel(
    source_ptr, num_tokens_ptr, inboxes_ptr, rows_ptr, scales_ptr, slot_ids_ptr, weights_ptr, scales_offset,
    slot_ids_offset, weights_offset,
    HIDDEN: tl.constexpr, PAD_H: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, TOP_K: tl.constexpr,
    PAD_K: tl.constexpr, QUANTIZED: tl.constexpr, ROW_BITS: tl.constexpr, ROUTERS: tl.constexpr, PAD_R: tl.constexpr,
):  # fmt: skip
    """One program per row of the capacity. All routers' addresses are asked for while it learns which one it needs."""
    row, router = tl.program_id(0), tl.arange(0, PAD_R)
    num_tokens, source = tl.load(num_tokens_ptr), tl.load(source_ptr + row)
    inboxes = tl.load(inboxes_ptr + router, mask=router < ROUTERS, other=0)
    if row >= num_tokens:
        return
    base = tl.sum(tl.where(router == source >> ROW_BITS, inboxes, 0), 0)
    ours, theirs = row.to(tl.int64), (source & ((1 << ROW_BITS) - 1)).to(tl.int64)
    column = tl.arange(0, PAD_H)
    place = tl.multiple_of(base.to(tl.pointer_type(rows_ptr.dtype.element_ty)), 16) + theirs * HIDDEN
    values = tl.load(place + column, mask=column < HIDDEN, cache_modifier=".cv")
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
    partials_ptr, source_ptr, numbers_ptr, num_tokens_ptr, job_ptr, boxes_ptr, flags_ptr, words_ptr, host_address,
    HIDDEN: tl.constexpr, PAD_H: tl.constexpr, ROUTERS: tl.constexpr, PAD_R: tl.constexpr, JOB: tl.constexpr,
    RETURNED: tl.constexpr, COUNTED: tl.constexpr, NUM_COUNTS: tl.constexpr, DONE: tl.constexpr,
    ANSWERED: tl.constexpr, ENDED: tl.constexpr, NUMBERS: tl.constexpr, ROW_BITS: tl.constexpr,
):  # fmt: skip
    """One program per row of the capacity, which it publishes; the last one says in host memory what is done."""
    row, router = tl.program_id(0), tl.arange(0, PAD_R)
    num_tokens, source = tl.load(num_tokens_ptr), tl.load(source_ptr + row)
    number = tl.load(numbers_ptr + row)
    boxes = tl.load(boxes_ptr + router, mask=router < ROUTERS, other=0)
    flags = tl.load(flags_ptr + router, mask=router < ROUTERS, other=0)
    column = tl.arange(0, PAD_H)
    values = tl.load(partials_ptr + row.to(tl.int64) * HIDDEN + column, mask=column < HIDDEN)
    if row < num_tokens:
        is_ours, theirs = router == source >> ROW_BITS, source & ((1 << ROW_BITS) - 1)
        flag = tl.sum(tl.where(is_ours, flags, 0), 0).to(tl.pointer_type(tl.int32)) + theirs
        box = tl.sum(tl.where(is_ours, boxes, 0), 0).to(tl.pointer_type(partials_ptr.dtype.element_ty))
        box = tl.multiple_of(box, 16)
        tl.store(box + theirs.to(tl.int64) * HIDDEN + column, values, mask=column < HIDDEN)
        tl.debug_barrier()
        tl.atomic_xchg(flag, number, sem="release", scope="sys")
    if tl.atomic_add(words_ptr + RETURNED, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(words_ptr + RETURNED, 0)
        count = tl.arange(0, NUM_COUNTS)
        is_ended = tl.load(job_ptr + ENDED + router, mask=router < ROUTERS, other=0) != 0
        newest = tl.load(job_ptr + NUMBERS + router, mask=router < ROUTERS, other=0)
        host = host_address.to(tl.pointer_type(tl.int32))
        tl.store(host + ANSWERED + router, newest, mask=is_ended)
        tl.store(host + DONE + 1 + count, tl.load(words_ptr + COUNTED + count))
        done = tl.load(words_ptr + JOB) + 1
        tl.store(words_ptr + JOB, done)
        tl.debug_barrier()
        tl.atomic_xchg(host + DONE, done, sem="release", scope="sys")

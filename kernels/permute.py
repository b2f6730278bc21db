"""Tokens in slot order: the rows that the grouped GEMMs read, and the table of row blocks that tells which slot owns
them.

Shapes: T tokens, K choices per token, E slots, H hidden, R = T * K rows at most, B row blocks at most.

Rows are compact: slot e owns rows [start_e, start_e + count_e), with no padding between slots. A GEMM tile reads
block_m rows from its block's first row; the rows past the block's end belong to the next slot and their results are
dropped. Everything is decided on the device (no host synchronisation), and the order within a slot is the
assignments' order, so equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from ep.kernels.quant import quantize_block
from ep.kernels.reference import MIN_AMAX, TOKEN_BLOCK

MAX_ONE_PASS_ASSIGNMENTS = 4096
"""Up to here each row's program finds its own place by looking at all assignments; above, a two-pass count does."""

COUNT_CHUNK = 512
"""Assignments that one program of the two-pass count looks at."""

BLOCK_FIELDS = 4
"""Integers per entry of the block table: slot, first row, end row, padding."""


def max_row_blocks(num_assignments: int, num_slots: int, block_m: int) -> int:
    """Upper bound of sum(ceil(count_e / block_m)) over all ways to spread the assignments over the slots."""
    return (num_assignments + (block_m - 1) * min(num_slots, num_assignments)) // block_m


def count_chunks(num_assignments: int) -> int:
    """Chunks of the two-pass count; 0 when one pass is enough."""
    if num_assignments <= MAX_ONE_PASS_ASSIGNMENTS:
        return 0
    return triton.cdiv(num_assignments, COUNT_CHUNK)


def permute_tokens(
    x: torch.Tensor, x_scales: torch.Tensor | None, slot_ids: torch.Tensor, num_tokens: torch.Tensor,
    rows: torch.Tensor, row_scales: torch.Tensor | None, row_assignment: torch.Tensor,
    blocks: torch.Tensor, num_blocks: torch.Tensor, counts: torch.Tensor, position: torch.Tensor,
    zero_out: torch.Tensor | None, *, num_slots: int, block_m: int, fp8_max: float, pdl: bool = False,
) -> None:  # fmt: skip
    """Writes each valid assignment's token, quantised when `row_scales` is given, to its row in slot order.

    x [T, H] (bf16, or e4m3 with x_scales [T, H/128]); slot_ids [T, K] int32, -1 = not here; num_tokens [1] int32.
    Writes rows [>=R, H], row_scales [H/128, >=R] (transposed: a GEMM step reads one column block of many rows),
    row_assignment [>=R] int32 (t * K + k), blocks [B, 4] int32, num_blocks [1] int32; scratch: counts
    [chunks, E], position [T * K]. With zero_out [T, H], tokens without a row here get zeros there (only
    asked for when K is 1).
    """
    capacity, top_k = slot_ids.shape
    num_assignments = capacity * top_k
    hidden = x.shape[1]
    num_chunks = count_chunks(num_assignments)
    # Few distinct sizes, so that few kernels are compiled.
    pad_slots = 32 if num_slots <= 32 else 256 if num_slots <= 256 else triton.next_power_of_2(num_slots)
    pad_assignments = next((n for n in (64, 512, MAX_ONE_PASS_ASSIGNMENTS) if num_assignments <= n), 0)
    step = max(16, 8192 // pad_slots)
    max_blocks = max_row_blocks(num_assignments, num_slots, block_m)
    if num_chunks:
        _count_kernel[(num_chunks,)](
            slot_ids, num_tokens, counts, top_k, num_slots, CHUNK=COUNT_CHUNK, SLOTS=pad_slots,
        )  # fmt: skip
        _place_kernel[(num_chunks,)](
            slot_ids, num_tokens, counts, position, row_assignment, blocks, num_blocks, top_k, num_slots, max_blocks,
            num_chunks, block_m, CHUNK=COUNT_CHUNK, STEP=step, SLOTS=pad_slots,
        )  # fmt: skip
    _permute_kernel[(num_assignments + (0 if num_chunks else 1),)](
        x, x_scales, slot_ids, num_tokens, rows, row_scales, row_assignment, blocks, num_blocks, position, zero_out,
        x.stride(0), 0 if row_scales is None else row_scales.stride(0), num_assignments, num_slots, max_blocks, block_m,
        HIDDEN=hidden, COLUMNS=triton.next_power_of_2(triton.cdiv(hidden, TOKEN_BLOCK)), GROUP=TOKEN_BLOCK, TOP_K=top_k,
        ASSIGNMENTS=0 if num_chunks else pad_assignments, SLOTS=pad_slots, STEP=step,
        QUANTIZE=row_scales is not None and x_scales is None, COPY_SCALES=x_scales is not None,
        ZERO_OUT=zero_out is not None, FP8_MAX=fp8_max, MIN_AMAX=MIN_AMAX, PDL=pdl, num_warps=8,
    )  # fmt: skip


@triton.jit
def _load_slots(slot_ids_ptr, offsets, end, num_slots):
    """Slot of each assignment; -1 where there is none."""
    slot = tl.load(slot_ids_ptr + offsets, mask=offsets < end, other=-1)
    return tl.where((slot >= 0) & (slot < num_slots), slot, -1)


@triton.jit
def _count_slots(slot, SLOTS: tl.constexpr):
    """Assignments to each slot [SLOTS]; those without one are counted behind all that there are."""
    counts = tl.reshape(tl.histogram(tl.where(slot >= 0, slot, SLOTS), 2 * SLOTS), (2, SLOTS))
    return tl.sum(tl.where(tl.arange(0, 2)[:, None] == 0, counts, 0), 0)


@triton.jit
def _write_block_table(count, blocks_ptr, num_blocks_ptr, max_blocks, block_m, SLOTS: tl.constexpr,
                       STEP: tl.constexpr):  # fmt: skip
    """count [SLOTS] int32 -> for each row block, in slot order: slot, first row, end row."""
    slots = tl.arange(0, SLOTS)
    row_end = tl.cumsum(count, 0)
    row_start = row_end - count
    slot_blocks = (count + block_m - 1) // block_m
    block_end = tl.cumsum(slot_blocks, 0)
    block_start = block_end - slot_blocks
    total = tl.sum(slot_blocks, 0)
    tl.store(num_blocks_ptr, total)
    for first in range(0, total, STEP):
        block = first + tl.arange(0, STEP)
        owns = (block[:, None] >= block_start[None, :]) & (block[:, None] < block_end[None, :])
        slot = tl.sum(tl.where(owns, slots[None, :], 0), 1)
        begin = tl.sum(tl.where(owns, row_start[None, :] + (block[:, None] - block_start[None, :]) * block_m, 0), 1)
        end = tl.sum(tl.where(owns, row_end[None, :], 0), 1)
        entry = blocks_ptr + block * 4
        mask = (block < total) & (block < max_blocks)
        tl.store(entry, slot, mask=mask)
        tl.store(entry + 1, begin, mask=mask)
        tl.store(entry + 2, tl.minimum(begin + block_m, end), mask=mask)


@triton.jit(do_not_specialize=["top_k", "num_slots"])
def _count_kernel(slot_ids_ptr, num_tokens_ptr, counts_ptr, top_k, num_slots,
                  CHUNK: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    """counts[chunk, e]: assignments to slot e in this chunk."""
    chunk = tl.program_id(0)
    end = tl.load(num_tokens_ptr) * top_k
    slots = tl.arange(0, SLOTS)
    slot = _load_slots(slot_ids_ptr, chunk * CHUNK + tl.arange(0, CHUNK), end, num_slots)
    count = _count_slots(slot, SLOTS)
    tl.store(counts_ptr + chunk * num_slots + slots, count, mask=slots < num_slots)


@triton.jit(do_not_specialize=["top_k", "num_slots", "max_blocks", "num_chunks", "block_m"])
def _place_kernel(slot_ids_ptr, num_tokens_ptr, counts_ptr, position_ptr, row_assignment_ptr, blocks_ptr,
                  num_blocks_ptr, top_k, num_slots, max_blocks,
                  num_chunks, block_m, CHUNK: tl.constexpr, STEP: tl.constexpr,
                  SLOTS: tl.constexpr):  # fmt: skip
    """position[i]: the row of assignment i, or -1. Program 0 also writes the block table."""
    chunk = tl.program_id(0)
    end = tl.load(num_tokens_ptr) * top_k
    slots = tl.arange(0, SLOTS)
    total = tl.zeros((SLOTS,), tl.int32)
    before = tl.zeros((SLOTS,), tl.int32)
    for other in range(0, num_chunks, 16):
        others = other + tl.arange(0, 16)
        mask = (others < num_chunks)[:, None] & (slots < num_slots)[None, :]
        count = tl.load(counts_ptr + others[:, None] * num_slots + slots[None, :], mask=mask, other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((others < chunk)[:, None], count, 0), 0)
    next_row = tl.cumsum(total, 0) - total + before
    for first in range(0, CHUNK, STEP):
        assignment = chunk * CHUNK + first + tl.arange(0, STEP)
        slot = _load_slots(slot_ids_ptr, assignment, end, num_slots)
        mine = (slot[:, None] == slots[None, :]).to(tl.int32)
        rank = tl.cumsum(mine, 0) - mine
        row = tl.sum(mine * (rank + next_row[None, :]), 1)
        tl.store(position_ptr + assignment, tl.where(slot >= 0, row, -1), mask=assignment < end)
        tl.store(row_assignment_ptr + row, assignment, mask=slot >= 0)
        next_row += tl.sum(mine, 0)
    if chunk == 0:
        _write_block_table(total, blocks_ptr, num_blocks_ptr, max_blocks, block_m, SLOTS, STEP)


@triton.jit(do_not_specialize=["num_assignments", "num_slots", "max_blocks", "block_m"])
def _permute_kernel(
    x_ptr, x_scales_ptr, slot_ids_ptr, num_tokens_ptr, rows_ptr, row_scales_ptr, row_assignment_ptr, blocks_ptr,
    num_blocks_ptr, position_ptr, zero_out_ptr, x_stride, scale_stride, num_assignments, num_slots, max_blocks, block_m,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, TOP_K: tl.constexpr, ASSIGNMENTS: tl.constexpr,
    SLOTS: tl.constexpr, STEP: tl.constexpr, QUANTIZE: tl.constexpr, COPY_SCALES: tl.constexpr,
    ZERO_OUT: tl.constexpr, FP8_MAX: tl.constexpr, MIN_AMAX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per assignment; with ASSIGNMENTS > 0 (one pass) one more writes the block table."""
    if PDL:
        gdc_launch_dependents()
    assignment = tl.program_id(0)
    end = tl.load(num_tokens_ptr) * TOP_K
    if ASSIGNMENTS > 0:
        if assignment == num_assignments:
            count = _count_slots(_load_slots(slot_ids_ptr, tl.arange(0, ASSIGNMENTS), end, num_slots), SLOTS)
            _write_block_table(count, blocks_ptr, num_blocks_ptr, max_blocks, block_m, SLOTS, STEP)
            return
    if assignment >= end:
        return
    token = (assignment // TOP_K).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    offsets = column[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = offsets < HIDDEN
    if ASSIGNMENTS > 0:
        offset = tl.arange(0, ASSIGNMENTS)
        slot = _load_slots(slot_ids_ptr, offset, end, num_slots)
        mine = tl.load(slot_ids_ptr + assignment)
        mine = tl.where(mine < num_slots, mine, -1)
        earlier = (slot >= 0) & ((slot < mine) | ((slot == mine) & (offset < assignment)))
        row = tl.where(mine >= 0, tl.sum(earlier.to(tl.int32), 0), -1)
    else:
        row = tl.load(position_ptr + assignment)
    if row < 0:
        if ZERO_OUT:
            zeros = tl.zeros((COLUMNS, GROUP), zero_out_ptr.dtype.element_ty)
            tl.store(zero_out_ptr + token * HIDDEN + offsets, zeros, mask=mask)
        return
    if ASSIGNMENTS > 0:
        tl.store(row_assignment_ptr + row, assignment)
    x = tl.load(x_ptr + token * x_stride + offsets, mask=mask, other=0.0)
    target = rows_ptr + row.to(tl.int64) * HIDDEN + offsets
    if QUANTIZE:
        q, scale = quantize_block(x.to(tl.float32), FP8_MAX, MIN_AMAX)
        tl.store(target, q.to(rows_ptr.dtype.element_ty), mask=mask)
        tl.store(row_scales_ptr + column * scale_stride + row, scale, mask=column * GROUP < HIDDEN)
    else:
        tl.store(target, x, mask=mask)
        if COPY_SCALES:
            scale = tl.load(x_scales_ptr + token * (HIDDEN // GROUP) + column, mask=column * GROUP < HIDDEN, other=0.0)
            tl.store(row_scales_ptr + column * scale_stride + row, scale, mask=column * GROUP < HIDDEN)

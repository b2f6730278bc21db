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
"""Up to here each token's program finds its rows by looking at all assignments; above, by what was counted before."""

CHUNK_ASSIGNMENTS = 512
"""Assignments, of whole tokens, that are counted together where there are more."""

BLOCK_FIELDS = 4
"""Integers per entry of the block table: slot, first row, end row, padding."""


def max_row_blocks(num_assignments: int, num_slots: int, block_m: int) -> int:
    """Upper bound of sum(ceil(count_e / block_m)) over all ways to spread the assignments over the slots."""
    return (num_assignments + (block_m - 1) * min(num_slots, num_assignments)) // block_m


def num_chunks(num_tokens: int, top_k: int) -> int:
    """Chunks that are counted before rows are found; 0 where one pass is enough."""
    if num_tokens * top_k <= MAX_ONE_PASS_ASSIGNMENTS:
        return 0
    return triton.cdiv(num_tokens, CHUNK_ASSIGNMENTS // top_k)


def permute_tokens(
    x: torch.Tensor, x_scales: torch.Tensor | None, slot_ids: torch.Tensor, num_tokens: torch.Tensor,
    rows: torch.Tensor, row_scales: torch.Tensor | None, row_assignment: torch.Tensor,
    blocks: torch.Tensor, num_blocks: torch.Tensor, counts: torch.Tensor, starts: torch.Tensor,
    zero_out: torch.Tensor | None, *, num_slots: int, block_m: int, fp8_max: float, pdl: bool = False,
) -> None:  # fmt: skip
    """Writes each valid assignment's token, quantised when `row_scales` is given, to its row in slot order.

    x [T, H] (bf16, or e4m3 with x_scales [T, H/128]); slot_ids [T, K] int32, -1 = not here; num_tokens [1] int32.
    Writes rows [>=R, H], row_scales [H/128, >=R] (transposed: a GEMM step reads one column block of many rows),
    row_assignment [>=R] int32 (t * K + k), blocks [B, 4] int32, num_blocks [1] int32; scratch: counts and starts, both
    [num_chunks(T, K), E] int32. With zero_out [T, H], tokens without a row here get zeros there (only asked for when
    K is 1).
    """
    capacity, top_k = slot_ids.shape
    hidden = x.shape[1]
    chunks = num_chunks(capacity, top_k)
    # Few distinct sizes, so that few kernels are compiled.
    pad_slots = 32 if num_slots <= 32 else 256 if num_slots <= 256 else triton.next_power_of_2(num_slots)
    pad_assignments = next((n for n in (64, 512) if capacity * top_k <= n), MAX_ONE_PASS_ASSIGNMENTS)
    if chunks:
        _count_kernel[(chunks,)](
            slot_ids, num_tokens, counts, num_slots, CHUNK=CHUNK_ASSIGNMENTS, TOP_K=top_k, SLOTS=pad_slots,
        )  # fmt: skip
        _start_kernel[(chunks,)](counts, starts, blocks, num_blocks, num_slots, chunks, block_m, SLOTS=pad_slots)
    _permute_kernel[(capacity + (not chunks),)](
        x, x_scales, slot_ids, num_tokens, rows, row_scales, row_assignment, blocks, num_blocks, starts, zero_out,
        x.stride(0), 0 if row_scales is None else row_scales.stride(0), num_slots, block_m,
        HIDDEN=hidden, COLUMNS=triton.next_power_of_2(triton.cdiv(hidden, TOKEN_BLOCK)), GROUP=TOKEN_BLOCK, TOP_K=top_k,
        ASSIGNMENTS=CHUNK_ASSIGNMENTS if chunks else pad_assignments, ONE_PASS=not chunks, SLOTS=pad_slots,
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
def _write_block_table(count, blocks_ptr, num_blocks_ptr, block_m, SLOTS: tl.constexpr):
    """count [SLOTS] int32 -> for each row block, in slot order: slot, first row, end row."""
    slots = tl.arange(0, SLOTS)
    row_end = tl.cumsum(count, 0)
    row_start = row_end - count
    slot_blocks = (count + block_m - 1) // block_m
    block_start = tl.cumsum(slot_blocks, 0) - slot_blocks
    tl.store(num_blocks_ptr, tl.sum(slot_blocks, 0))
    for nth in range(tl.max(slot_blocks, 0)):
        entry = blocks_ptr + (block_start + nth) * 4
        first = row_start + nth * block_m
        mask = nth < slot_blocks
        tl.store(entry, slots, mask=mask)
        tl.store(entry + 1, first, mask=mask)
        tl.store(entry + 2, tl.minimum(first + block_m, row_end), mask=mask)


@triton.jit(do_not_specialize=["num_slots"])
def _count_kernel(slot_ids_ptr, num_tokens_ptr, counts_ptr, num_slots,
                  CHUNK: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    """counts[chunk, e]: assignments to slot e in this chunk."""
    SIZE: tl.constexpr = CHUNK // TOP_K * TOP_K
    chunk = tl.program_id(0)
    first = chunk * SIZE
    end = tl.minimum(tl.load(num_tokens_ptr) * TOP_K, first + SIZE)
    slots = tl.arange(0, SLOTS)
    count = _count_slots(_load_slots(slot_ids_ptr, first + tl.arange(0, CHUNK), end, num_slots), SLOTS)
    tl.store(counts_ptr + chunk * num_slots + slots, count, mask=slots < num_slots)


@triton.jit(do_not_specialize=["num_slots", "num_chunks", "block_m"])
def _start_kernel(counts_ptr, starts_ptr, blocks_ptr, num_blocks_ptr, num_slots, num_chunks, block_m,
                  SLOTS: tl.constexpr):  # fmt: skip
    """starts[chunk, e]: the row of this chunk's first assignment to slot e. Program 0 also writes the block table."""
    chunk = tl.program_id(0)
    slots = tl.arange(0, SLOTS)
    total = tl.zeros((SLOTS,), tl.int32)
    before = tl.zeros((SLOTS,), tl.int32)
    for other in range(0, num_chunks, 16):
        others = other + tl.arange(0, 16)
        mask = (others < num_chunks)[:, None] & (slots < num_slots)[None, :]
        count = tl.load(counts_ptr + others[:, None] * num_slots + slots[None, :], mask=mask, other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((others < chunk)[:, None], count, 0), 0)
    start = tl.cumsum(total, 0) - total + before
    tl.store(starts_ptr + chunk * num_slots + slots, start, mask=slots < num_slots)
    if chunk == 0:
        _write_block_table(total, blocks_ptr, num_blocks_ptr, block_m, SLOTS)


@triton.jit(do_not_specialize=["num_slots", "block_m"])
def _permute_kernel(
    x_ptr, x_scales_ptr, slot_ids_ptr, num_tokens_ptr, rows_ptr, row_scales_ptr, row_assignment_ptr, blocks_ptr,
    num_blocks_ptr, starts_ptr, zero_out_ptr, x_stride, scale_stride, num_slots, block_m,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, TOP_K: tl.constexpr, ASSIGNMENTS: tl.constexpr,
    ONE_PASS: tl.constexpr, SLOTS: tl.constexpr, QUANTIZE: tl.constexpr, COPY_SCALES: tl.constexpr,
    ZERO_OUT: tl.constexpr, FP8_MAX: tl.constexpr, MIN_AMAX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per token; in one pass, the first writes the block table."""
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(0)
    num_tokens = tl.load(num_tokens_ptr)
    offset = tl.arange(0, ASSIGNMENTS)
    if ONE_PASS:
        slot = _load_slots(slot_ids_ptr, offset, num_tokens * TOP_K, num_slots)
        if token == 0:
            _write_block_table(_count_slots(slot, SLOTS), blocks_ptr, num_blocks_ptr, block_m, SLOTS)
            return
        token -= 1
        order = tl.where(slot >= 0, slot * ASSIGNMENTS + offset, 0x7FFFFFFF)
    else:
        SIZE: tl.constexpr = ASSIGNMENTS // TOP_K * TOP_K
        chunk = token * TOP_K // SIZE
        first = chunk * SIZE
        slot = _load_slots(slot_ids_ptr, first + offset, num_tokens * TOP_K, num_slots)
    if token >= num_tokens:
        return
    column = tl.arange(0, COLUMNS)
    offsets = column[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = offsets < HIDDEN
    has_block = column * GROUP < HIDDEN
    values = tl.load(x_ptr + token.to(tl.int64) * x_stride + offsets, mask=mask, other=0.0)
    if QUANTIZE:
        q, scale = quantize_block(values.to(tl.float32), FP8_MAX, MIN_AMAX)
        values = q.to(rows_ptr.dtype.element_ty)
    elif COPY_SCALES:
        scale = tl.load(x_scales_ptr + token * (HIDDEN // GROUP) + column, mask=has_block, other=0.0)
    for choice in range(TOP_K):
        assignment = token * TOP_K + choice
        mine = tl.load(slot_ids_ptr + assignment)
        if (mine >= 0) & (mine < num_slots):
            if ONE_PASS:
                row = tl.sum((order < mine * ASSIGNMENTS + assignment).to(tl.int32), 0)
            else:
                start = tl.load(starts_ptr + chunk * num_slots + mine)
                row = start + tl.sum(((slot == mine) & (first + offset < assignment)).to(tl.int32), 0)
            tl.store(row_assignment_ptr + row, assignment)
            tl.store(rows_ptr + row.to(tl.int64) * HIDDEN + offsets, values, mask=mask)
            if QUANTIZE or COPY_SCALES:
                tl.store(row_scales_ptr + column * scale_stride + row, scale, mask=has_block)
        elif ZERO_OUT:
            zeros = tl.zeros((COLUMNS, GROUP), zero_out_ptr.dtype.element_ty)
            tl.store(zero_out_ptr + token.to(tl.int64) * HIDDEN + offsets, zeros, mask=mask)

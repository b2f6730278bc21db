"""The two GEMMs of an expert over all slots in one launch each: the body that runs on every backend.

Shapes: R rows in slot order (see permute), E slots, H hidden, N intermediate, L layers.
  gate_up: rows [R, H] x weights [L, E, 2N, H] -> silu(gate) * up, quantised again -> [R, N] and scales [N/128, R]
  down:    rows [R, N] x weights [L, E, H, N]  -> row weight * y -> [T * K, H] at the row's assignment

For gate_up a program computes the gate and the up columns of the same BLOCK_N intermediate columns, so that SwiGLU
and the next quantisation (one scale per 128 columns) finish in registers. With block scales each 128 columns of K
are multiplied by the matrix unit and promoted to float32 with their scale, as in DeepSeek-V3 (arXiv 2412.19437,
section 3.3.2).

With few rows per slot the weights take the matrix unit's wide side (SWAP: W @ rows^T), and all that counts is to keep
enough bytes in flight: reading the weights once is the floor.

The layer and the number of row blocks are read on the device, so one captured graph serves every layer and token count.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["num_slots", "group_m"])
def grouped_gemm_kernel(
    rows, row_scales_ptr, weight, weight_scales_ptr, out_ptr, out_scales_ptr, row_assignment_ptr, topk_weights_ptr,
    blocks_ptr, num_blocks_ptr, layer_idx_ptr, row_scale_stride, out_scale_stride, num_slots, group_m,
    WEIGHT_ROWS: tl.constexpr, K: tl.constexpr, OUT_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, QUANTIZED: tl.constexpr, SWIGLU: tl.constexpr,
    SWAP: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr, SCALE_BLOCK: tl.constexpr, FP8_MAX: tl.constexpr,
    MIN_AMAX: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """rows [R, K] and weight [L * E * WEIGHT_ROWS, K] are tensor descriptors with TMA and pointers without."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    NUM_N: tl.constexpr = OUT_COLUMNS // BLOCK_N
    K_BLOCKS: tl.constexpr = (K + SCALE_BLOCK - 1) // SCALE_BLOCK
    num_blocks = tl.load(num_blocks_ptr)
    tile = tl.program_id(0)
    if tile >= num_blocks * NUM_N:
        return
    # group_m row blocks sweep the columns together: blocks of one slot share its weights in L2.
    first = tile // (group_m * NUM_N) * group_m
    group = tl.minimum(num_blocks - first, group_m)
    within = tile % (group_m * NUM_N)
    block = first + within % group
    column = within // group * BLOCK_N
    slot = tl.load(blocks_ptr + block * 4)
    row_start = tl.load(blocks_ptr + block * 4 + 1)
    row_end = tl.load(blocks_ptr + block * 4 + 2)
    matrix = tl.load(layer_idx_ptr) * num_slots + slot
    weight_row = matrix * WEIGHT_ROWS + column
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_up = acc
    if QUANTIZED:
        scale_row = matrix * (WEIGHT_ROWS // SCALE_BLOCK) + column // SCALE_BLOCK
        weight_scale_ptr = weight_scales_ptr + scale_row.to(tl.int64) * K_BLOCKS
        row_scale_ptr = row_scales_ptr + row_start + m
    if not TMA:
        x_ptr = rows + (row_start + m).to(tl.int64)[:, None] * K + k[None, :]
        w_ptr = weight + (weight_row.to(tl.int64) + n)[:, None] * K + k[None, :]
    for kb in tl.range(0, K // BLOCK_K, num_stages=STAGES):
        if TMA:
            x = rows.load([row_start, kb * BLOCK_K])
            w = weight.load([weight_row, kb * BLOCK_K])
        else:
            x = tl.load(x_ptr + kb * BLOCK_K)
            w = tl.load(w_ptr + kb * BLOCK_K)
        if SWIGLU:
            if TMA:
                w_up = weight.load([weight_row + OUT_COLUMNS, kb * BLOCK_K])
            else:
                w_up = tl.load(w_ptr + OUT_COLUMNS * K + kb * BLOCK_K)
        if QUANTIZED:
            row_scale = tl.load(row_scale_ptr + kb * row_scale_stride)
            scale = row_scale * tl.load(weight_scale_ptr + kb)
            if SWAP:
                acc += tl.dot(w, x.T) * scale[None, :]
            else:
                acc += tl.dot(x, w.T) * scale[:, None]
            if SWIGLU:
                scale_up = row_scale * tl.load(weight_scale_ptr + OUT_COLUMNS // SCALE_BLOCK * K_BLOCKS + kb)
                if SWAP:
                    acc_up += tl.dot(w_up, x.T) * scale_up[None, :]
                else:
                    acc_up += tl.dot(x, w_up.T) * scale_up[:, None]
        else:
            if SWAP:
                acc = tl.dot(w, x.T, acc)
            else:
                acc = tl.dot(x, w.T, acc)
            if SWIGLU:
                if SWAP:
                    acc_up = tl.dot(w_up, x.T, acc_up)
                else:
                    acc_up = tl.dot(x, w_up.T, acc_up)

    row = row_start + m
    valid = row < row_end
    if SWIGLU:
        h = acc / (1.0 + tl.exp(-acc)) * acc_up
        if SWAP:
            h = tl.trans(h)
        target = out_ptr + row.to(tl.int64)[:, None] * OUT_COLUMNS + (column + n)[None, :]
        if QUANTIZED:
            # Not `quantize_block`: h differs from the twin's in its last bits already, so a multiplication will do.
            amax = tl.maximum(tl.max(tl.abs(h), 1), MIN_AMAX)
            q = tl.minimum(tl.maximum(h * (FP8_MAX / amax)[:, None], -FP8_MAX), FP8_MAX)
            tl.store(target, q.to(out_ptr.dtype.element_ty), mask=valid[:, None])
            scale_ptr = out_scales_ptr + column // SCALE_BLOCK * out_scale_stride + row
            tl.store(scale_ptr, amax * (1.0 / FP8_MAX), mask=valid)
        else:
            tl.store(target, h.to(out_ptr.dtype.element_ty), mask=valid[:, None])
    else:
        assignment = tl.load(row_assignment_ptr + row, mask=valid, other=0)
        row_weight = tl.load(topk_weights_ptr + assignment, mask=valid, other=0.0)
        if SWAP:
            acc = tl.trans(acc)
        target = out_ptr + assignment.to(tl.int64)[:, None] * OUT_COLUMNS + (column + n)[None, :]
        tl.store(target, (acc * row_weight[:, None]).to(out_ptr.dtype.element_ty), mask=valid[:, None])


@triton.jit(do_not_specialize=["num_slots"])
def sum_choices_kernel(
    parts_ptr, slot_ids_ptr, num_tokens_ptr, out_ptr, num_slots,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of parts[t, k] where slot_ids[t, k] is a slot here; in float32, in order of k."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if token >= tl.load(num_tokens_ptr):
        return
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        slot = tl.load(slot_ids_ptr + token * TOP_K + k)
        columns_here = tl.where((slot >= 0) & (slot < num_slots), HIDDEN, 0)
        part = parts_ptr + (token * TOP_K + k) * HIDDEN + column
        total += tl.load(part, mask=column < columns_here, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * HIDDEN + column, total.to(out_ptr.dtype.element_ty), mask=column < HIDDEN)

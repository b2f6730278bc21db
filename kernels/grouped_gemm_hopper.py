"""The block-FP8 grouped GEMM of `grouped_gemm` for Hopper, with warps that only load and warps that only compute.

Shapes as in `grouped_gemm`. One program per multiprocessor walks over the tiles, each two 128-column tiles (gate and
up, or two neighbours for down) of one block of rows. A producer warp keeps STAGES stages of K in flight with the
copy engine (TMA), also across tiles, so the memory never waits for an epilogue.

- Many rows per slot (BLOCK_M 128): two consumer warp groups take 64 rows each; while one promotes its partial sums to
  float32 the other has the matrix unit.
- Few (BLOCK_M 16 or 32): one consumer takes all, the weights on the matrix unit's wide side, and a stage holds two
  steps of K: 256 neighbouring bytes of each weight row, which the memory serves 3 to 4% faster than 128.
- In between (BLOCK_M 64): the same, but two consumers with one half of each weight tile's rows each. For the next
  quantisation's scale they tell each other their rows' largest magnitudes.

The down GEMM is launched before the gate_up GEMM is done (programmatic dependent launch) and fetches weights meanwhile;
only its rows wait. Written in Gluon, Triton's language for explicit layouts.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Renamed in Triton 3.7.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.constexpr_function
def _choose(condition, yes, no):
    return yes if condition else no


@gluon.jit
def _tile_of(tile, work, NUM_N: gl.constexpr):
    """-> column tile, matrix, first row, end row; group_m row blocks sweep the columns together, for the L2's sake."""
    blocks_ptr, num_blocks, group_m, first_matrix = work
    first = tile // (group_m * NUM_N) * group_m
    group = gl.minimum(num_blocks - first, group_m)
    within = tile % (group_m * NUM_N)
    block_ptr = blocks_ptr + (first + within % group) * 4
    return within // group, first_matrix + gl.load(block_ptr), gl.load(block_ptr + 1), gl.load(block_ptr + 2)


@gluon.jit
def _load_weights(
    weight, weight_row, kb, barrier, weight_smem, stage, SECOND: gl.constexpr, STAGE_STEPS: gl.constexpr,
    PARTS: gl.constexpr,
):  # fmt: skip
    """Both tiles of a stage, each in PARTS parts of 128 / PARTS rows."""
    for tile in gl.static_range(2):
        for part in gl.static_range(PARTS):
            row = weight_row + tile * SECOND + part * (128 // PARTS)
            for j in gl.static_range(STAGE_STEPS):
                buffer = weight_smem.index(((stage * STAGE_STEPS + j) * 2 + tile) * PARTS + part)
                _tma_load(weight, [row, (kb + j) * 128], barrier, buffer)


@gluon.jit
def _produce(
    buffers, rows, weight, work, WEIGHT_ROWS: gl.constexpr, STEPS: gl.constexpr, STEP_N: gl.constexpr,
    NUM_N: gl.constexpr, SECOND: gl.constexpr, ROW_PARTS: gl.constexpr, WEIGHT_PARTS: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, STAGE_STEPS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """The loading warp. With EARLY the first stages' weights are asked for before the rows exist."""
    rows_smem, weight_smem, full, empty, met, amax_smem = buffers
    num_tiles = work[1] * NUM_N
    stage_bytes: gl.constexpr = (BLOCK_M + 2 * 128) * 128 * STAGE_STEPS
    if EARLY:
        if gl.program_id(0) < num_tiles:
            column, matrix, row_start, row_end = _tile_of(gl.program_id(0), work, NUM_N)
            weight_row = matrix * WEIGHT_ROWS + column * STEP_N
            for stage in gl.static_range(STAGES):
                barrier = full.index(stage)
                mbarrier.expect(barrier, stage_bytes)
                _load_weights(weight, weight_row, stage * STAGE_STEPS, barrier, weight_smem, stage, SECOND, STAGE_STEPS,
                              WEIGHT_PARTS)  # fmt: skip
        gdc_wait()
    filled = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        column, matrix, row_start, row_end = _tile_of(tile, work, NUM_N)
        weight_row = matrix * WEIGHT_ROWS + column * STEP_N
        for kb in range(0, STEPS, STAGE_STEPS):
            stage = filled % STAGES
            barrier = full.index(stage)
            if (not EARLY) or filled >= STAGES:
                mbarrier.wait(empty.index(stage), ((filled // STAGES) & 1) ^ 1)
                mbarrier.expect(barrier, stage_bytes)
                _load_weights(weight, weight_row, kb, barrier, weight_smem, stage, SECOND, STAGE_STEPS, WEIGHT_PARTS)
            for j in gl.static_range(STAGE_STEPS):
                for part in gl.static_range(ROW_PARTS):
                    buffer = rows_smem.index((stage * STAGE_STEPS + j) * ROW_PARTS + part)
                    _tma_load(rows, [row_start + part * (BLOCK_M // ROW_PARTS), (kb + j) * 128], barrier, buffer)
            filled += 1


@gluon.jit
def _multiply(x, w, into, SWAP: gl.constexpr):
    """x [M, 128] @ w [128, 128]^T, or its transpose, started; `into` only lends its registers."""
    if SWAP:
        token = warpgroup_mma(w, x.permute((1, 0)), into, use_acc=False, is_async=True)
    else:
        token = warpgroup_mma(x, w.permute((1, 0)), into, use_acc=False, is_async=True)
    return token


@gluon.jit
def _consume(
    buffers, tensors, work, consumer: gl.constexpr, WEIGHT_ROWS: gl.constexpr, STEPS: gl.constexpr,
    STEP_N: gl.constexpr, NUM_N: gl.constexpr, SECOND: gl.constexpr, OUT_COLUMNS: gl.constexpr,
    ROW_PARTS: gl.constexpr, WEIGHT_PARTS: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    STAGE_STEPS: gl.constexpr, EARLY: gl.constexpr, SWAP: gl.constexpr, SWIGLU: gl.constexpr, FP8_MAX: gl.constexpr,
    MIN_AMAX: gl.constexpr,
):  # fmt: skip
    """One computing warp group (4 warps): its part of the rows, or of the columns of two 128-column tiles."""
    M: gl.constexpr = BLOCK_M // ROW_PARTS
    N: gl.constexpr = 128 // WEIGHT_PARTS
    row_part: gl.constexpr = _choose(ROW_PARTS > 1, consumer, 0)
    column_part: gl.constexpr = _choose(WEIGHT_PARTS > 1, consumer, 0)
    ACC_M: gl.constexpr = _choose(SWAP, N, M)
    ACC_N: gl.constexpr = _choose(SWAP, M, N)
    COLUMN_DIM: gl.constexpr = _choose(SWAP, 0, 1)
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ACC_N, 32])
    row_layout: gl.constexpr = gl.SliceLayout(COLUMN_DIM, acc_layout)
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [4, 1], [1, 0])
    # With few rows there are registers for both tiles' partial sums at once.
    BOTH: gl.constexpr = ACC_M * ACC_N <= 4096
    rows_smem, weight_smem, full, empty, met, amax_smem = buffers
    (row_scales_ptr, weight_scales_ptr, out_ptr, out_scales_ptr, row_assignment_ptr, topk_weights_ptr, row_scale_stride,
     out_scale_stride) = tensors  # fmt: skip
    if EARLY:
        gdc_wait()
    p0 = gl.zeros([ACC_M, ACC_N], gl.float32, acc_layout)
    p1 = p0
    used = 0
    done = 0
    for tile in range(gl.program_id(0), work[1] * NUM_N, gl.num_programs(0)):
        tile_n, matrix, row_start, row_end = _tile_of(tile, work, NUM_N)
        column = tile_n * STEP_N
        row_start += row_part * M
        row = row_start + gl.arange(0, M, row_layout)
        row_scale_ptr = row_scales_ptr + row
        scale_row = matrix * (WEIGHT_ROWS // 128) + column // 128
        scale0_ptr = weight_scales_ptr + scale_row.to(gl.int64) * STEPS
        scale1_ptr = scale0_ptr + SECOND // 128 * STEPS
        acc0 = gl.zeros([ACC_M, ACC_N], gl.float32, acc_layout)
        acc1 = gl.zeros([ACC_M, ACC_N], gl.float32, acc_layout)
        if row_start < row_end:
            row_scale = gl.load(row_scale_ptr)
            scale0 = gl.load(scale0_ptr)
            scale1 = gl.load(scale1_ptr)
            for kb in range(0, STEPS, STAGE_STEPS):
                stage = used % STAGES
                mbarrier.wait(full.index(stage), (used // STAGES) & 1)
                for j in gl.static_range(STAGE_STEPS):
                    step = stage * STAGE_STEPS + j
                    x = rows_smem.index(step * ROW_PARTS + row_part)
                    w0 = weight_smem.index(step * 2 * WEIGHT_PARTS + column_part)
                    w1 = weight_smem.index((step * 2 + 1) * WEIGHT_PARTS + column_part)
                    s0 = gl.expand_dims(row_scale * scale0, COLUMN_DIM)
                    s1 = gl.expand_dims(row_scale * scale1, COLUMN_DIM)
                    p0_token = _multiply(x, w0, p0, SWAP)
                    if BOTH:
                        p1_token = _multiply(x, w1, p1, SWAP)
                    following = gl.minimum(kb + j + 1, STEPS - 1)
                    row_scale = gl.load(row_scale_ptr + following * row_scale_stride)
                    scale0 = gl.load(scale0_ptr + following)
                    scale1 = gl.load(scale1_ptr + following)
                    if BOTH:
                        p0 = warpgroup_mma_wait(1, deps=[p0_token])
                        acc0 += p0 * s0
                        p1 = warpgroup_mma_wait(0, deps=[p1_token])
                    else:
                        p0 = warpgroup_mma_wait(0, deps=[p0_token])
                        acc0 += p0 * s0
                        p0 = warpgroup_mma_wait(0, deps=[_multiply(x, w1, p0, SWAP)])
                    if j == STAGE_STEPS - 1:
                        mbarrier.arrive(empty.index(stage))
                    if BOTH:
                        acc1 += p1 * s1
                    else:
                        acc1 += p0 * s1
                used += 1
            _store_tile(acc0, acc1, tensors, row_start, row_end, tile_n, column + column_part * N, met, amax_smem, done,
                        column_part, WEIGHT_PARTS, SECOND, OUT_COLUMNS, M, N, COLUMN_DIM, row_layout, store_layout,
                        SWAP, SWIGLU, FP8_MAX, MIN_AMAX)  # fmt: skip
            done += 1
        else:
            # The block ends in the other consumer's rows: leave it the matrix unit.
            for kb in range(0, STEPS, STAGE_STEPS):
                stage = used % STAGES
                mbarrier.wait(full.index(stage), (used // STAGES) & 1)
                mbarrier.arrive(empty.index(stage))
                used += 1


@gluon.jit
def _store_tile(
    acc0, acc1, tensors, row_start, row_end, tile_n, column, met, amax_smem, done, part: gl.constexpr,
    WEIGHT_PARTS: gl.constexpr, SECOND: gl.constexpr, OUT_COLUMNS: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    COLUMN_DIM: gl.constexpr, row_layout: gl.constexpr, store_layout: gl.constexpr,
    SWAP: gl.constexpr, SWIGLU: gl.constexpr, FP8_MAX: gl.constexpr, MIN_AMAX: gl.constexpr,
):  # fmt: skip
    """silu(acc0) * acc1, quantised; or both tiles times their rows' weights."""
    (row_scales_ptr, weight_scales_ptr, out_ptr, out_scales_ptr, row_assignment_ptr, topk_weights_ptr, row_scale_stride,
     out_scale_stride) = tensors  # fmt: skip
    row = row_start + gl.arange(0, M, row_layout)
    store_row = row_start + gl.arange(0, M, gl.SliceLayout(1, store_layout))
    columns = (column + gl.arange(0, N, gl.SliceLayout(0, store_layout)))[None, :]
    mask = (store_row < row_end)[:, None]
    if SWIGLU:
        h = acc0 / (1.0 + gl.exp(-acc0)) * acc1
        amax = gl.maximum(gl.max(gl.abs(h), COLUMN_DIM), MIN_AMAX)
        if WEIGHT_PARTS == 2:
            # Two sets in turn: the other consumer may still read this tile's when this one writes the next tile's.
            turn = done % 2
            amax_smem.index(turn * 2 + part).store(amax)
            _barrier()
            mbarrier.arrive(met)
            mbarrier.wait(met, turn)
            amax = gl.maximum(amax, amax_smem.index(turn * 2 + 1 - part).load(row_layout))
        q = h * gl.expand_dims(FP8_MAX / amax, COLUMN_DIM)
        q = gl.minimum(gl.maximum(q, -FP8_MAX), FP8_MAX).to(out_ptr.dtype.element_ty)
        if SWAP:
            q = gl.permute(q, (1, 0))
        target = out_ptr + store_row.to(gl.int64)[:, None] * OUT_COLUMNS + columns
        gl.store(target, gl.convert_layout(q, store_layout), mask=mask)
        if part == 0:
            gl.store(out_scales_ptr + tile_n * out_scale_stride + row, amax * (1.0 / FP8_MAX), mask=row < row_end)
    else:
        assignment = gl.load(row_assignment_ptr + row, mask=row < row_end, other=0)
        row_weight = gl.load(topk_weights_ptr + assignment, mask=row < row_end, other=0.0)
        row_weight = gl.expand_dims(row_weight, COLUMN_DIM)
        y0 = acc0 * row_weight
        y1 = acc1 * row_weight
        if out_ptr.dtype.element_ty == gl.float32:
            # Eight neighbouring lanes' or one quad's values fill a memory sector as they lie.
            n_layout: gl.constexpr = gl.SliceLayout(1 - COLUMN_DIM, row_layout.parent)
            n = gl.expand_dims(column + gl.arange(0, N, n_layout), 1 - COLUMN_DIM)
            target = out_ptr + gl.expand_dims(assignment.to(gl.int64) * OUT_COLUMNS, COLUMN_DIM) + n
            valid = gl.expand_dims(row < row_end, COLUMN_DIM)
            gl.store(target, y0, mask=valid)
            gl.store(target + SECOND, y1, mask=valid)
        else:
            y0 = y0.to(out_ptr.dtype.element_ty)
            y1 = y1.to(out_ptr.dtype.element_ty)
            if SWAP:
                y0 = gl.permute(y0, (1, 0))
                y1 = gl.permute(y1, (1, 0))
            store_assignment = gl.load(row_assignment_ptr + store_row, mask=store_row < row_end, other=0)
            target = out_ptr + store_assignment.to(gl.int64)[:, None] * OUT_COLUMNS + columns
            gl.store(target, gl.convert_layout(y0, store_layout), mask=mask)
            gl.store(target + SECOND, gl.convert_layout(y1, store_layout), mask=mask)


@gluon.jit(do_not_specialize=["num_slots", "group_m"])
def grouped_gemm_hopper_kernel(
    rows, row_scales_ptr, weight, weight_scales_ptr, out_ptr, out_scales_ptr, row_assignment_ptr, topk_weights_ptr,
    blocks_ptr, num_blocks_ptr, layer_idx_ptr, row_scale_stride, out_scale_stride, num_slots, group_m,
    WEIGHT_ROWS: gl.constexpr, K: gl.constexpr, OUT_COLUMNS: gl.constexpr, BLOCK_M: gl.constexpr,
    SWIGLU: gl.constexpr, CONSUMERS: gl.constexpr, SWAP: gl.constexpr, STAGES: gl.constexpr, STAGE_STEPS: gl.constexpr,
    EARLY: gl.constexpr, FP8_MAX: gl.constexpr, MIN_AMAX: gl.constexpr,
):  # fmt: skip
    """rows: descriptor of [R, K], weight: of [L * E * WEIGHT_ROWS, K], in blocks of 128 columns of K.

    Where two consumers share the rows, a block of rows has BLOCK_M / 2; where they share the weights, one has 64.
    """
    ROW_PARTS: gl.constexpr = _choose(SWAP, 1, CONSUMERS)
    WEIGHT_PARTS: gl.constexpr = _choose(SWAP, CONSUMERS, 1)
    STEPS: gl.constexpr = K // 128
    STEP_N: gl.constexpr = _choose(SWIGLU, 128, 256)
    NUM_N: gl.constexpr = OUT_COLUMNS // STEP_N
    SECOND: gl.constexpr = _choose(SWIGLU, OUT_COLUMNS, 128)
    if not EARLY:
        gdc_wait()
    gdc_launch_dependents()
    rows_smem = gl.allocate_shared_memory(
        rows.dtype, [STAGES * STAGE_STEPS * ROW_PARTS] + rows.block_type.shape, rows.layout
    )
    weight_smem = gl.allocate_shared_memory(
        weight.dtype, [STAGES * STAGE_STEPS * 2 * WEIGHT_PARTS] + weight.block_type.shape, weight.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    met = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    amax_smem = gl.allocate_shared_memory(gl.float32, [4, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    mbarrier.init(met, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    buffers = (rows_smem, weight_smem, full, empty, met, amax_smem)
    tensors = (row_scales_ptr, weight_scales_ptr, out_ptr, out_scales_ptr, row_assignment_ptr, topk_weights_ptr,
               row_scale_stride, out_scale_stride)  # fmt: skip
    work = (blocks_ptr, gl.load(num_blocks_ptr), group_m, gl.load(layer_idx_ptr) * num_slots)
    # Constants stay constants only when they are written in the call itself.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (buffers, tensors, work, 0, WEIGHT_ROWS, STEPS, STEP_N, NUM_N, SECOND, OUT_COLUMNS,
                            ROW_PARTS, WEIGHT_PARTS, BLOCK_M, STAGES, STAGE_STEPS, EARLY,
                            SWAP, SWIGLU, FP8_MAX, MIN_AMAX)),
                (_consume, (buffers, tensors, work, 1, WEIGHT_ROWS, STEPS, STEP_N, NUM_N, SECOND, OUT_COLUMNS,
                            ROW_PARTS, WEIGHT_PARTS, BLOCK_M, STAGES, STAGE_STEPS, EARLY,
                            SWAP, SWIGLU, FP8_MAX, MIN_AMAX)),
                (_produce, (buffers, rows, weight, work, WEIGHT_ROWS, STEPS, STEP_N, NUM_N, SECOND, ROW_PARTS,
                            WEIGHT_PARTS, BLOCK_M, STAGES, STAGE_STEPS, EARLY)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (buffers, tensors, work, 0, WEIGHT_ROWS, STEPS, STEP_N, NUM_N, SECOND, OUT_COLUMNS,
                            ROW_PARTS, WEIGHT_PARTS, BLOCK_M, STAGES, STAGE_STEPS, EARLY,
                            SWAP, SWIGLU, FP8_MAX, MIN_AMAX)),
                (_produce, (buffers, rows, weight, work, WEIGHT_ROWS, STEPS, STEP_N, NUM_N, SECOND, ROW_PARTS,
                            WEIGHT_PARTS, BLOCK_M, STAGES, STAGE_STEPS, EARLY)),
            ],
            [1],
            [40],
        )  # fmt: skip

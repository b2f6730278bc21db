"""The experts of one shard, whole: tokens in slot order -> gate_up -> SiLU * mul -> down -> weighted sum per token.

Shapes: T tokens (capacity of the call), K choices per token, L MoE layers, E slots, H hidden, N intermediate.

No host synchronisation: the layer index, the number of tokens and the slot counts are read on the device, and all
layers' weights lie in one stacked tensor, so one captured graph per token capacity serves every layer. Launches:
permute (sorts and quantises), two grouped GEMMs and, when K is above 1, the sum over a token's choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from ep.kernels import permute
from ep.kernels.devices import Device, current_device
from ep.kernels.gemm_plan import SCALE_BLOCK, GemmPlan, plan_gemm
from ep.kernels.grouped_gemm import grouped_gemm_kernel, sum_choices_kernel
from ep.kernels.quant import fp8_max
from ep.kernels.reference import MIN_AMAX, Quantized
from ep.kernels.tuning import TileConfig, find_table

SLACK_ROWS = 256
"""Rows past the last that a tile may read (never use): the largest BLOCK_SIZE_M."""

SUM_BLOCK = 1024
"""Columns that one program sums."""

HOST = Device("host", "sm_00", units=1, shared_bytes=227 << 10)
"""Stands for a CPU: Triton's interpreter runs the portable body there."""


@dataclass(frozen=True)
class ExpertShape:
    """L, E, H, N and the weights' dtype: an e4m3 with block scales, or bfloat16."""

    num_layers: int
    num_slots: int
    hidden: int
    intermediate: int
    dtype: torch.dtype

    @property
    def quantized(self) -> bool:
        return self.dtype.itemsize == 1


@dataclass(frozen=True)
class ExpertWeights:
    """All MoE layers' weights of one shard, stacked.

    gate_up [L, E, 2N, H] (gate rows, then up rows) and down [L, E, H, N], both e4m3 with scales
    gate_up_scale_inv [L, E, 2N/128, H/128] and down_scale_inv [L, E, H/128, N/128] float32, or both bf16 without.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale_inv: torch.Tensor | None = None
    down_scale_inv: torch.Tensor | None = None

    @property
    def shape(self) -> ExpertShape:
        layers, slots, double, hidden = self.gate_up.shape
        return ExpertShape(layers, slots, hidden, double // 2, self.gate_up.dtype)

    @property
    def nbytes(self) -> int:
        """Over all layers, scales included."""
        return sum(part.nbytes for part in vars(self).values() if part is not None)


def supports(shape: ExpertShape, device: Device) -> tuple[bool, str]:
    """Whether `fused_moe` can run experts of this shape there, and why not; to be asked before weights are loaded."""
    multiple = SCALE_BLOCK if shape.quantized else 64
    for name, size in (("hidden size", shape.hidden), ("intermediate size", shape.intermediate)):
        if size % multiple:
            return False, f"{name} is {size}, expected a multiple of {multiple}"
    if shape.num_layers * shape.num_slots * max(2 * shape.intermediate, shape.hidden) >= 2**31:
        return False, f"{shape.num_layers} layers x {shape.num_slots} slots have 2^31 weight rows or more"
    if shape.quantized:
        if device.fp8_dtype is None:
            return False, f"{device.name} ({device.arch}) has no FP8 matrix units"
        if shape.dtype != device.fp8_dtype:
            return False, f"weights are {shape.dtype}, {device.name} ({device.arch}) computes in {device.fp8_dtype}"
    elif shape.dtype != torch.bfloat16:
        return False, f"weights are {shape.dtype}, expected an e4m3 with block scales or bfloat16"
    elif not device.is_amd and int(device.arch[3:]) < 80:
        return False, f"{device.name} ({device.arch}) has no bfloat16 matrix units"
    return True, "ok"


def choose_config(shape: ExpertShape, num_tokens: int, device: Device) -> TileConfig:
    """The tuned tile for calls of up to num_tokens tokens (see tuning for where it comes from)."""
    table = find_table(shape.num_slots, shape.intermediate, device, shape.quantized)
    return table.for_tokens(num_tokens, shape.num_slots)


@dataclass(frozen=True)
class Workspace:
    """Buffers between the launches, allocated once for the largest call; calls of one stream share it."""

    rows: torch.Tensor
    row_scales: torch.Tensor | None
    inter: torch.Tensor
    inter_scales: torch.Tensor | None
    parts: torch.Tensor
    row_assignment: torch.Tensor
    counts: torch.Tensor
    starts: torch.Tensor
    blocks: torch.Tensor
    num_blocks: torch.Tensor

    @classmethod
    def allocate(cls, weights: ExpertWeights, max_tokens: int, top_k: int) -> Workspace:
        """Room for calls of up to max_tokens tokens with top_k choices each."""
        device, shape = weights.gate_up.device, weights.shape
        assignments = max_tokens * top_k
        rows, chunks = assignments + SLACK_ROWS, permute.num_chunks(max_tokens, top_k)

        def scales(columns: int) -> torch.Tensor | None:
            if not shape.quantized:
                return None
            return torch.empty(columns // SCALE_BLOCK, triton.cdiv(rows, 32) * 32, dtype=torch.float32, device=device)

        def ints(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return cls(
            rows=torch.empty(rows, shape.hidden, dtype=shape.dtype, device=device),
            row_scales=scales(shape.hidden),
            inter=torch.empty(rows, shape.intermediate, dtype=shape.dtype, device=device),
            inter_scales=scales(shape.intermediate),
            # Not bfloat16: rounded twice, a sum would be further off than its own rounding.
            parts=torch.empty(assignments if top_k > 1 else 0, shape.hidden, dtype=torch.float32, device=device),
            row_assignment=ints(rows),
            counts=ints(chunks, shape.num_slots),
            starts=ints(chunks, shape.num_slots),
            blocks=ints(permute.max_row_blocks(assignments, shape.num_slots, 16), permute.BLOCK_FIELDS),
            num_blocks=ints(1),
        )


def fused_moe(
    x: torch.Tensor | Quantized,
    weights: ExpertWeights,
    slot_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    layer_idx: torch.Tensor,
    num_tokens: torch.Tensor,
    out: torch.Tensor,
    workspace: Workspace,
    config: TileConfig | None = None,
    device: Device | None = None,
) -> torch.Tensor:
    """out[t] = sum over k of topk_weights[t, k] * expert(slot_ids[t, k])(x[t]), for the first num_tokens tokens.

    x [T, H] bf16, or Quantized with q [T, H] e4m3 and scale_inv [T, H/128] float32; slot_ids [T, K] int32, -1 for a
    choice that another shard serves; topk_weights [T, K] float32; layer_idx and num_tokens [1] int32 on the device;
    out [T, H] bf16 or float32. A token without a choice here gets zeros; rows of out past num_tokens are left alone.
    config and device default to the tuned tile for T tokens and to where x is.

    Raises ValueError for operands of other shapes or types. Twin: `reference.experts_forward`.
    """
    shape = weights.shape
    _check(x, shape, slot_ids, topk_weights, out, workspace)
    if slot_ids.numel() == 0:
        return out
    if device is None:
        device = current_device(out.device.index) if out.is_cuda else HOST
    if config is None:
        config = choose_config(shape, slot_ids.shape[0], device)
    q, x_scales = (x.q, x.scale_inv) if isinstance(x, Quantized) else (x, None)
    single = slot_ids.shape[1] == 1
    permute.permute_tokens(
        q, x_scales, slot_ids, num_tokens, workspace.rows, workspace.row_scales, workspace.row_assignment,
        workspace.blocks, workspace.num_blocks, workspace.counts, workspace.starts, out if single else None,
        num_slots=shape.num_slots, block_m=config.block_m, fp8_max=fp8_max(shape.dtype) if shape.quantized else 0.0,
        pdl=device.has_tma and out.is_cuda,
    )  # fmt: skip
    gate_up_gemm(weights, layer_idx, workspace, slot_ids.numel(), config, device)
    parts = out if single else workspace.parts
    down_gemm(weights, layer_idx, workspace, topk_weights, parts, config, device)
    if not single:
        sum_choices(parts, slot_ids, num_tokens, out, shape.num_slots)
    return out


def gate_up_gemm(
    weights: ExpertWeights, layer_idx: torch.Tensor, workspace: Workspace, num_assignments: int, config: TileConfig,
    device: Device,
) -> None:  # fmt: skip
    """workspace.rows -> workspace.inter: silu(gate) * up per row, quantised again when the weights are."""
    _launch(
        workspace.rows, workspace.row_scales, weights.gate_up, weights.gate_up_scale_inv, workspace.inter,
        workspace.inter_scales, None, layer_idx, workspace, num_assignments, config, device,
    )  # fmt: skip


def down_gemm(
    weights: ExpertWeights, layer_idx: torch.Tensor, workspace: Workspace, topk_weights: torch.Tensor,
    parts: torch.Tensor, config: TileConfig, device: Device,
) -> None:  # fmt: skip
    """workspace.inter -> parts [T * K, H], each row times its weight, at its assignment."""
    _launch(
        workspace.inter, workspace.inter_scales, weights.down, weights.down_scale_inv, parts, None, topk_weights,
        layer_idx, workspace, topk_weights.numel(), config, device,
    )  # fmt: skip


def sum_choices(
    parts: torch.Tensor, slot_ids: torch.Tensor, num_tokens: torch.Tensor, out: torch.Tensor, num_slots: int
) -> None:
    """parts [T * K, H] -> out [T, H], over the choices that have a slot here."""
    num_rows, top_k = slot_ids.shape
    sum_choices_kernel[(num_rows, triton.cdiv(out.shape[1], SUM_BLOCK))](
        parts, slot_ids, num_tokens, out, num_slots, HIDDEN=out.shape[1], TOP_K=top_k, BLOCK=SUM_BLOCK, num_warps=4,
    )  # fmt: skip


def _check(
    x: torch.Tensor | Quantized, shape: ExpertShape, slot_ids: torch.Tensor, topk_weights: torch.Tensor,
    out: torch.Tensor, workspace: Workspace,
) -> None:  # fmt: skip
    """Raises ValueError for what a kernel would silently read wrongly."""
    values = x.q if isinstance(x, Quantized) else x
    dtype = shape.dtype if isinstance(x, Quantized) else torch.bfloat16
    num_tokens, top_k = slot_ids.shape
    expected = {
        "x": (values, (num_tokens, shape.hidden), dtype),
        "slot_ids": (slot_ids, (num_tokens, top_k), torch.int32),
        "topk_weights": (topk_weights, (num_tokens, top_k), torch.float32),
        "out": (out, (num_tokens, shape.hidden), torch.float32 if out.dtype == torch.float32 else torch.bfloat16),
    }
    if isinstance(x, Quantized):
        blocks = (num_tokens, shape.hidden // SCALE_BLOCK)
        expected["scale_inv"] = (x.scale_inv, blocks, torch.float32)
    for name, (tensor, size, kind) in expected.items():
        if tuple(tensor.shape) != size or tensor.dtype != kind or not tensor.is_contiguous():
            is_what = f"{tuple(tensor.shape)} {tensor.dtype}{'' if tensor.is_contiguous() else ', not contiguous'}"
            raise ValueError(f"fused_moe: {name} is {is_what}, expected contiguous {size} {kind}")
    room = len(workspace.row_assignment) - SLACK_ROWS
    if slot_ids.numel() > room or permute.num_chunks(num_tokens, top_k) > len(workspace.counts):
        raise ValueError(f"fused_moe: {num_tokens} tokens x {top_k} choices, the workspace has room for {room} in all")


def _launch(
    rows: torch.Tensor, row_scales: torch.Tensor | None, weight: torch.Tensor, weight_scales: torch.Tensor | None,
    out: torch.Tensor, out_scales: torch.Tensor | None, topk_weights: torch.Tensor | None, layer_idx: torch.Tensor,
    workspace: Workspace, num_assignments: int, config: TileConfig, device: Device,
) -> None:  # fmt: skip
    """One grouped GEMM; without topk_weights it is gate_up, with them down."""
    swiglu, quantized = topk_weights is None, row_scales is not None
    num_slots, weight_rows, k = weight.shape[1:]
    out_columns = weight_rows // 2 if swiglu else weight_rows
    plan = plan_gemm(config, device, k, out_columns, weight.itemsize, swiglu=swiglu, quantized=quantized)
    column_tiles = out_columns // (plan.block_n * (2 if plan.hopper and not swiglu else 1))
    tiles = permute.max_row_blocks(num_assignments, num_slots, plan.block_m) * column_tiles
    operands = (
        row_scales, weight_scales, out, out_scales, workspace.row_assignment, topk_weights, workspace.blocks,
        workspace.num_blocks, layer_idx, 0 if row_scales is None else row_scales.stride(0),
        0 if out_scales is None else out_scales.stride(0), num_slots, plan.group_m,
    )  # fmt: skip
    constants: dict[str, Any] = {
        "WEIGHT_ROWS": weight_rows, "K": k, "OUT_COLUMNS": out_columns, "BLOCK_M": plan.block_m, "SWIGLU": swiglu,
        "SWAP": plan.swap, "STAGES": plan.stages, "FP8_MAX": fp8_max(weight.dtype) if quantized else 0.0, "MIN_AMAX":
        MIN_AMAX, "num_warps": plan.num_warps,
    }  # fmt: skip
    pdl = device.has_tma and out.is_cuda
    if pdl:
        constants["launch_pdl"] = True
    if plan.hopper:
        _launch_hopper(min(tiles, device.units), plan, rows, weight.view(-1, k), operands, constants)
        return
    if device.is_amd:
        amd = {"waves_per_eu": config.waves_per_eu, "matrix_instr_nonkdim": config.matrix_instr_nonkdim}
        constants |= {**amd, "kpack": config.kpack or 1}
    grouped_gemm_kernel[(tiles,)](
        _describe(rows, [plan.block_m, plan.block_k], plan), operands[0],
        _describe(weight.view(-1, k), [plan.block_n, plan.block_k], plan), *operands[1:],
        BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, QUANTIZED=quantized, TMA=plan.tma, PDL=pdl, SCALE_BLOCK=SCALE_BLOCK,
        num_stages=max(plan.stages, 1), **constants,
    )  # fmt: skip


def _describe(tensor: torch.Tensor, block: list[int], plan: GemmPlan) -> Any:
    """The tensor itself, or its descriptor for the copy engine."""
    if not plan.tma:
        return tensor
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, block)


def _launch_hopper(
    programs: int, plan: GemmPlan, rows: torch.Tensor, weight: torch.Tensor, operands: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:  # fmt: skip
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from ep.kernels.grouped_gemm_hopper import grouped_gemm_hopper_kernel

    def describe(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv))

    early = not constants["SWIGLU"] and plan.stages * plan.stage_steps <= constants["K"] // SCALE_BLOCK
    grouped_gemm_hopper_kernel[(programs,)](
        describe(rows, [plan.block_m // (1 if plan.swap else plan.consumers), SCALE_BLOCK]), operands[0],
        describe(weight, [SCALE_BLOCK // (plan.consumers if plan.swap else 1), SCALE_BLOCK]), *operands[1:],
        CONSUMERS=plan.consumers, STAGE_STEPS=plan.stage_steps, EARLY=early, **constants,
    )  # fmt: skip

"""Experts on a GPU: all MoE layers' slots stacked in its memory, computed by the Triton kernels (kernels/fused_moe.py).

Shape legend: L MoE layers, E slots, T tokens, K choices per token, H hidden, N intermediate.
FP8 checkpoints stay FP8, in the flavour of e4m3 that the device multiplies; bf16 checkpoints stay bf16.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from ep.checkpoint import SlotWeights
from ep.compute.base import Work
from ep.compute.ipc_experts import IpcExperts
from ep.compute.passes import joined, pair_table, passes
from ep.errors import ModelError
from ep.kernels import fused_moe as op
from ep.kernels.devices import Device
from ep.kernels.gemm_plan import SCALE_BLOCK
from ep.kernels.quant import to_fnuz
from ep.kernels.reference import Quantized, dequantize_tokens
from ep.kernels.tuning import find_table
from ep.model import ModelSpec


def supports(spec: ModelSpec, num_slots: int, device: Device) -> tuple[bool, str]:
    """Whether the kernels can run this model's experts there, and why (not); to be asked before weights are read."""
    if spec.quant_block not in (None, (SCALE_BLOCK, SCALE_BLOCK)):
        return False, f"scale blocks are {spec.quant_block}, expected ({SCALE_BLOCK}, {SCALE_BLOCK})"
    shape = _shape(spec, num_slots, device)
    supported, reason = op.supports(shape, device)
    if not supported:
        return False, reason
    table = find_table(num_slots, shape.intermediate, device, shape.quantized)
    dtype = str(shape.dtype).removeprefix("torch.")
    return True, f"Triton in {dtype} on {device.name} ({device.arch}); tiles: {Path(table.source).name}, {table.reason}"


class GpuCompute:
    """An ExpertCompute. max_tokens: tokens of one pass, for which the work space is allocated once; more are computed
    in several passes. for_router: `partials` alone will be called, with all choices of every token and bf16 out.
    Raises ModelError where `supports` says no, with nothing allocated."""

    path = "triton"

    def __init__(
        self, spec: ModelSpec, num_slots: int, torch_device: torch.device, device: Device, max_tokens: int,
        for_router: bool = False,
    ) -> None:  # fmt: skip
        supported, self.reason = supports(spec, num_slots, device)
        if not supported:
            raise ModelError(f"{spec.source}: experts cannot be computed on {device.name}: {self.reason}")
        self._device, self._torch_device = device, torch_device
        self._max_tokens, self._top_k, self._for_router = max_tokens, spec.top_k, for_router
        self._weights = _allocate(_shape(spec, num_slots, device), torch_device)
        self._num_loaded = 0  # slots, over all layers
        self._layer_idx = torch.arange(spec.num_moe_layers, dtype=torch.int32, device=torch_device)
        self._num_tokens = torch.zeros(1, dtype=torch.int32, device=torch_device)
        self._workspace: op.Workspace | None = None

    @property
    def slot_bytes(self) -> int:
        return self._weights.nbytes

    @property
    def slot_format(self) -> str:
        return f"{self.path} {self._weights.shape.dtype}"

    def slot_parts(self, layer_pos: int, slot_idx: int) -> list[torch.Tensor]:
        weights = self._weights
        stacks = (weights.gate_up, weights.down, weights.gate_up_scale_inv, weights.down_scale_inv)
        return [stack[layer_pos, slot_idx] for stack in stacks if stack is not None]

    def load_slot(self, layer_pos: int, slot_idx: int, weights: SlotWeights) -> None:
        self._write(layer_pos, slot_idx, weights)

    def _write(self, layer_pos: int, first: int, weights: SlotWeights) -> None:
        """From slot `first` on."""
        ours, slots = self._weights, slice(first, first + weights.num_slots)
        scales = [_layer(scale, layer_pos) for scale in (ours.gate_up_scale_inv, ours.down_scale_inv)]
        gate_up_scale, down_scale = (None if scale is None else scale[slots] for scale in scales)
        _copy_in(weights.w13, weights.w13_scale, ours.gate_up[layer_pos, slots], gate_up_scale)
        _copy_in(weights.w2, weights.w2_scale, ours.down[layer_pos, slots], down_scale)

    def add_slots(self, weights: SlotWeights) -> None:
        layer_pos, first = divmod(self._num_loaded, self._weights.shape.num_slots)
        self._write(layer_pos, first, weights)
        self._num_loaded += weights.num_slots

    def finish(self) -> None:
        """Allocates the work space and compiles the kernels, by passes of every size that chooses others."""
        assert self._num_loaded == len(self._layer_idx) * self._weights.shape.num_slots, "slots are missing"
        self._workspace = op.Workspace.allocate(self._weights, self._max_tokens, self._top_k)
        if self._torch_device.type != "cuda":
            return
        for power in range((self._max_tokens * self._top_k).bit_length()):
            num_tokens = min(1 << power, self._max_tokens)
            rows = self._empty(num_tokens)
            if self._for_router:
                kinds = [(self._top_k, torch.bfloat16, rows[0])]
            else:
                kinds = list(itertools.product(self._widths(), (torch.bfloat16, torch.float32), rows))
            for width, dtype, x in kinds:
                slot_ids = torch.zeros(num_tokens, width, dtype=torch.int32, device=self._torch_device)
                weights = torch.zeros(num_tokens, width, device=self._torch_device)
                self._launch(0, x, slot_ids, weights, dtype, 1 << power)
        torch.cuda.synchronize(self._torch_device)

    def _widths(self) -> list[int]:
        """Of the tables that `pair_table` makes."""
        return sorted({min(self._top_k, 1 << power) for power in range(self._top_k.bit_length() + 1)})

    def _empty(self, num_tokens: int) -> list[torch.Tensor | Quantized]:
        """Zeros of every kind of rows that `_rows` returns."""
        shape = self._weights.shape
        size, device = (num_tokens, shape.hidden), self._torch_device
        rows: list[torch.Tensor | Quantized] = [torch.zeros(size, dtype=torch.bfloat16, device=device)]
        if shape.quantized:
            scales = torch.ones(num_tokens, shape.hidden // SCALE_BLOCK, device=device)
            rows.append(Quantized(torch.zeros(size, device=device).to(shape.dtype), scales))
        return rows

    def run(self, layer_pos: int, works: Sequence[Work]) -> None:
        for group in passes(works, self._max_tokens):
            self._pass(layer_pos, group)

    def for_jobs(self, job_tokens: int, num_shards: int, is_hosted: bool = False) -> IpcExperts:
        return IpcExperts(self._weights, self._device, self._top_k, job_tokens, num_shards, is_hosted)

    def partials(
        self,
        layer_pos: int,
        x: torch.Tensor,
        slot_ids: torch.Tensor,
        weights: torch.Tensor,
        num_tokens: torch.Tensor,
        dtype: torch.dtype = torch.bfloat16,
    ) -> torch.Tensor:
        """For operands on the device, by launches alone: may be captured in a graph.

        x [T, H] bf16, slot_ids int32 and weights float32 [T, K], num_tokens int32 [1], at most T -> [T, H] of `dtype`;
        rows from num_tokens on are undefined. Raises ValueError for T beyond the work space.
        """
        shape = self._weights.shape
        out = torch.empty(len(x), shape.hidden, dtype=dtype, device=x.device)
        return op.fused_moe(
            x,
            self._weights,
            slot_ids,
            weights,
            layer_idx=self._layer_idx[layer_pos : layer_pos + 1],
            num_tokens=num_tokens,
            out=out,
            workspace=self._finished(),
            config=op.choose_config(shape, slot_ids.numel(), self._device),
            device=self._device,
        )

    def _finished(self) -> op.Workspace:
        assert self._workspace is not None, "not finished"
        return self._workspace

    def _pass(self, layer_pos: int, works: list[Work]) -> None:
        """All copies and launches are queued on one stream; the host waits once, for the partials."""
        table = pair_table(works, self._top_k)
        dtypes = {work.out.dtype for work in works}
        out = self._launch(
            layer_pos,
            self._rows(works),
            self._to_device(torch.from_numpy(table.slot_ids)),
            self._to_device(torch.from_numpy(table.weights)),
            torch.float32 if torch.float32 in dtypes else torch.bfloat16,
            int(sum(work.counts.sum() for work in works)),
        )
        for work, part in zip(works, self._to_host(out).split([len(work.counts) for work in works]), strict=True):
            work.out.copy_(part)

    def _rows(self, works: list[Work]) -> torch.Tensor | Quantized:
        """On the device, as the kernels take them."""
        rows = self._to_device(joined([work.rows for work in works]))
        scales = [work.scales for work in works if work.scales is not None]
        if not scales:
            return rows.bfloat16()
        quantized = Quantized(rows, self._to_device(joined(scales)))
        if not self._weights.shape.quantized:
            return dequantize_tokens(quantized.q, quantized.scale_inv).bfloat16()
        if self._weights.shape.dtype == torch.float8_e4m3fnuz:
            return to_fnuz(quantized.q, quantized.scale_inv)
        return quantized

    def _launch(
        self,
        layer_pos: int,
        x: torch.Tensor | Quantized,
        slot_ids: torch.Tensor,
        weights: torch.Tensor,
        dtype: torch.dtype,
        num_pairs: int,
    ) -> torch.Tensor:
        """Partials [T, H] of `dtype` on the device. The tile is the one for num_pairs rows: as a tuned file counts."""
        workspace, shape = self._finished(), self._weights.shape
        out = torch.empty(len(slot_ids), shape.hidden, dtype=dtype, device=self._torch_device)
        with torch.cuda.device_of(out):
            return op.fused_moe(
                x,
                self._weights,
                slot_ids,
                weights,
                layer_idx=self._layer_idx[layer_pos : layer_pos + 1],
                num_tokens=self._num_tokens.fill_(len(slot_ids)),
                out=out,
                workspace=workspace,
                config=op.choose_config(shape, num_pairs, self._device),
                device=self._device,
            )

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Through pinned memory, which torch keeps from call to call, so that the copy runs beside the host."""
        if self._torch_device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._torch_device, non_blocking=True)

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cuda":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(tensor.device).synchronize()
        return host


def _shape(spec: ModelSpec, num_slots: int, device: Device) -> op.ExpertShape:
    dtype = torch.bfloat16 if spec.quant_block is None else device.fp8_dtype or torch.float8_e4m3fn
    return op.ExpertShape(spec.num_moe_layers, num_slots, spec.hidden_size, spec.moe_intermediate_size, dtype)


def _allocate(shape: op.ExpertShape, device: torch.device) -> op.ExpertWeights:
    """Uninitialised."""

    def matrices(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        stack = (shape.num_layers, shape.num_slots)
        weight = torch.empty(*stack, rows, columns, dtype=shape.dtype, device=device)
        if not shape.quantized:
            return weight, None
        return weight, torch.empty(*stack, rows // SCALE_BLOCK, columns // SCALE_BLOCK, device=device)

    gate_up, gate_up_scale_inv = matrices(2 * shape.intermediate, shape.hidden)
    down, down_scale_inv = matrices(shape.hidden, shape.intermediate)
    return op.ExpertWeights(gate_up, down, gate_up_scale_inv, down_scale_inv)


def _layer(tensor: torch.Tensor | None, layer: int) -> torch.Tensor | None:
    return None if tensor is None else tensor[layer]


def _copy_in(
    weight: torch.Tensor, scale: torch.Tensor | None, out: torch.Tensor, scale_out: torch.Tensor | None
) -> None:
    """One layer of one matrix, slot by slot: what a conversion needs beside the slots is one expert's worth."""
    assert (scale is None) == (scale_out is None) and weight.shape == out.shape
    assert scale is not None or weight.dtype == out.dtype
    for slot, target in enumerate(out):
        if scale is None or scale_out is None:
            target.copy_(weight[slot])
            continue
        values = Quantized(weight[slot].to(out.device), scale[slot].to(out.device))
        if out.dtype == torch.float8_e4m3fnuz:
            values = to_fnuz(values.q, values.scale_inv)
        target.copy_(values.q)
        scale_out[slot].copy_(values.scale_inv)

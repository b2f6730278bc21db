"""What a tile costs on a GPU that is not here: the portable GEMM compiled for it, and what its assembly says.

Used to reject tiles before they are timed or shipped: spilled registers, more LDS than there is, FP8 that the compiler
emulates. It does not rank tiles: for that assembly has been seen to be no better than the rule.
Not for a process that runs Triton's interpreter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ep.kernels.gemm_plan import SCALE_BLOCK
from ep.kernels.grouped_gemm import grouped_gemm_kernel
from ep.kernels.quant import fp8_max
from ep.kernels.reference import MIN_AMAX
from ep.kernels.tuning import TileConfig

TRITON_NAMES = {
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e4m3fnuz: "fp8e4b8",
    torch.bfloat16: "bf16",
}
LARGE = ("weight",)
"""Operands that may exceed 2 GB: their addresses need 64 bits."""


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel. lds and scratch in bytes; vgprs and spilled registers per thread; counts of
    instructions."""

    lds: int
    vgprs: int
    spills: int
    scratch: int
    fp8_mfma: int
    other_mfma: int

    def problem(self, lds_limit: int, quantized: bool = True) -> str | None:
        """Why the tile cannot be used, or None."""
        if self.lds > lds_limit:
            return f"{self.lds} bytes of LDS, the device has {lds_limit}"
        if self.spills or self.scratch:
            return f"{self.spills} registers spilled, {self.scratch} bytes of scratch"
        if quantized and (self.fp8_mfma == 0 or self.other_mfma > 0):
            return f"{self.fp8_mfma} FP8 matrix instructions, {self.other_mfma} others: FP8 is emulated"
        return None


def compile_for_amd(
    config: TileConfig, arch: str, dtype: torch.dtype, hidden: int, intermediate: int, *, swiglu: bool
) -> Resources:
    """Compiles the gate_up (swiglu) or down GEMM of experts [2N, H] and [H, N] for gfx942 or gfx950."""
    quantized = dtype.itemsize == 1
    k, weight_rows = (hidden, 2 * intermediate) if swiglu else (intermediate, hidden)
    constants = {
        "WEIGHT_ROWS": weight_rows, "K": k, "OUT_COLUMNS": intermediate if swiglu else hidden, "BLOCK_M":
        config.block_m, "BLOCK_N": SCALE_BLOCK if quantized else config.block_n, "BLOCK_K": SCALE_BLOCK if quantized
        else config.block_k, "QUANTIZED": quantized, "SWIGLU": swiglu, "SWAP": False, "TMA": False, "PDL": False,
        "SCALE_BLOCK": SCALE_BLOCK, "FP8_MAX": fp8_max(dtype) if quantized else 0.0, "MIN_AMAX": MIN_AMAX, "STAGES":
    config.num_stages, }  # fmt: skip
    value = TRITON_NAMES[dtype]
    types = {
        "rows": f"*{value}", "row_scales_ptr": "*fp32", "weight": f"*{value}", "weight_scales_ptr": "*fp32",
        "out_ptr": f"*{value}" if swiglu else "*bf16", "out_scales_ptr": "*fp32", "row_assignment_ptr": "*i32",
        "topk_weights_ptr": "*fp32", "blocks_ptr": "*i32", "num_blocks_ptr": "*i32", "layer_idx_ptr": "*i32",
        "row_scale_stride": "i32", "out_scale_stride": "i32", "num_slots": "i32", "group_m": "i32",
    }  # fmt: skip
    names = grouped_gemm_kernel.arg_names
    attributes = {}
    for position, name in enumerate(names):
        if name in types and types[name].startswith("*"):
            marks = [["tt.divisibility", 16]] + ([] if name in LARGE else [["tt.pointer_range", 32]])
            attributes[(position,)] = marks
    source = ASTSource(
        fn=grouped_gemm_kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs=attributes,
    )
    options = {
        "num_warps": config.num_warps, "num_stages": config.num_stages, "waves_per_eu": config.waves_per_eu,
        "matrix_instr_nonkdim": config.matrix_instr_nonkdim, "kpack": config.kpack or 1,
    }  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("hip", arch, 64), options=options)
    return _read(compiled.asm["amdgcn"], compiled.metadata.shared)


def _read(assembly: str, lds: int) -> Resources:
    def field(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        assert found is not None, key
        return int(found.group(1))

    matrix = re.findall(r"v_s?mfma_f32_\S+", assembly)
    fp8 = [name for name in matrix if "fp8" in name or "f8f6f4" in name]
    return Resources(
        lds, field("vgpr_count"), field("vgpr_spill_count"), field("private_segment_fixed_size"),
        len(fp8), len(matrix) - len(fp8),
    )  # fmt: skip

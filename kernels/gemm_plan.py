"""From a tuned tile to a launch: which body runs a grouped GEMM on this device, and with which constants.

The tuned files have one tile for both GEMMs and no word for what only some bodies know (TMA, swapped operands, steps
per stage), so the rest follows by rule from the tile, the shape and the device. The rules were measured;
docs/benchmarks says how.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

from ep.kernels.devices import Device
from ep.kernels.tuning import TileConfig

SCALE_BLOCK = 128
"""Side of a weight's scale block, and the depth of one step of K with block scales."""

HOPPER_BLOCKS = (16, 32, 64, 128)
"""Rows per block that the Hopper body knows how to share out."""

EPILOGUE_BYTES = 24 << 10
"""Shared memory to leave for the layout changes of an epilogue and for barriers."""


@dataclass(frozen=True)
class GemmPlan:
    """One launch. hopper: grouped_gemm_hopper, else grouped_gemm; consumers and stage_steps are the former's alone."""

    hopper: bool
    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    stages: int
    swap: bool
    tma: bool
    consumers: int = 1
    stage_steps: int = 1


def plan_gemm(
    config: TileConfig, device: Device, k: int, out_columns: int, itemsize: int, *, swiglu: bool, quantized: bool
) -> GemmPlan:
    """The launch for one GEMM: weight [rows, k] of `itemsize` bytes, output of `out_columns` columns."""
    plan = GemmPlan(
        hopper=False,
        block_m=config.block_m,
        block_n=SCALE_BLOCK if quantized else config.block_n,
        block_k=SCALE_BLOCK if quantized else config.block_k,
        group_m=config.group_m,
        num_warps=config.num_warps,
        stages=config.num_stages,
        swap=device.has_tma and config.block_m <= 32,
        tma=device.has_tma,
    )
    tile_pairs = out_columns % SCALE_BLOCK == 0 if swiglu else out_columns % (2 * SCALE_BLOCK) == 0
    if device.is_hopper and quantized and tile_pairs and config.block_m in HOPPER_BLOCKS and has_gluon():
        steps = k // SCALE_BLOCK
        swap = plan.block_m <= 64
        stage_steps = 2 if swap and steps % 2 == 0 else 1
        stage_bytes = stage_steps * (2 * plan.block_n + plan.block_m) * plan.block_k
        fitting = (device.shared_bytes - EPILOGUE_BYTES) // stage_bytes
        stages = max(2, min(config.num_stages // stage_steps, fitting, steps // stage_steps))
        consumers = 2 if plan.block_m >= 64 else 1
        return replace(
            plan, hopper=True, swap=swap, num_warps=4, stages=stages, consumers=consumers, stage_steps=stage_steps
        )
    if device.is_amd:
        return plan
    stage_bytes = (plan.block_n * (2 if swiglu else 1) + plan.block_m) * plan.block_k * itemsize
    return replace(plan, stages=max(1, min(plan.stages, (device.shared_bytes - EPILOGUE_BYTES) // stage_bytes)))


@cache
def has_gluon() -> bool:
    """Whether this Triton (3.6 or later) has the language that the Hopper body is written in."""
    return find_spec("triton.experimental.gluon.nvidia.hopper") is not None

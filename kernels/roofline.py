"""How much work each op is, at least, and how fast a device has been seen to do such work.

Bytes count every operand once: what no kernel can do without. Floating-point operations count a multiply-add as two.
"""

from __future__ import annotations

from dataclasses import dataclass

from ep.kernels.fused_moe import ExpertShape


@dataclass(frozen=True)
class Work:
    """flops, and bytes moved to and from device memory."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to reach: matrix products in FLOP/s by operand type, plain reading in bytes/s."""

    fp8_flops: float
    bf16_flops: float
    read_bytes: float

    def floor_us(self, work: Work, quantized: bool = True) -> float:
        """No kernel is much faster than the slower of its two floors."""
        flops = self.fp8_flops if quantized else self.bf16_flops
        return max(work.flops / flops, work.bytes / self.read_bytes) * 1e6


MEASURED = {"NVIDIA_H200": Ceilings(fp8_flops=1289e12, bf16_flops=788e12, read_bytes=4.36e12)}
"""cuBLAS on 8192 x 8192 x 8192 and a Triton kernel that reads 8.6 GB, by the device's name in tuned files."""


def gating_work(num_tokens: int, num_experts: int, top_k: int) -> Work:
    """Logits in; ids and weights out."""
    return Work(0, num_tokens * (4 * num_experts + 8 * top_k))


def assign_work(num_tokens: int, top_k: int) -> Work:
    """Of every choice the expert in, its slot in and out, its counter in and out."""
    return Work(0, num_tokens * top_k * (4 + 4 + 4 + 8 + 8))


def quantize_work(num_tokens: int, hidden: int) -> Work:
    """bf16 in; e4m3 and one float32 scale per 128 columns out."""
    return Work(0, num_tokens * (2 * hidden + hidden + 4 * (hidden // 128)))


def fused_moe_work(shape: ExpertShape, num_rows: int, used_slots: int, num_tokens: int) -> Work:
    """num_rows: assignments that have a slot here; used_slots: slots with at least one of them."""
    params = 3 * shape.hidden * shape.intermediate
    scales = 4 * params // 128**2 if shape.quantized else 0
    weight_bytes = used_slots * (params * shape.dtype.itemsize + scales)
    return Work(2 * num_rows * params, weight_bytes + num_tokens * shape.hidden * (2 + 2))

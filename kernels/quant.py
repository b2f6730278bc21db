"""Block quantisation of activations to e4m3: per token, one float32 scale for each 128 columns.

Shapes: T tokens, H columns. A value is `code * scale`, and `scale = max(|x|) / FP8_MAX` over the 128 columns.

NVIDIA and gfx950 compute with e4m3fn (maximum 448), gfx942 with e4m3fnuz (maximum 240, exponent bias 8 instead of 7,
and the code 0x80, which is -0 in e4m3fn, is its NaN). Checkpoints are e4m3fn: `to_fnuz` converts weights once, exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ep.kernels.reference import MIN_AMAX, TOKEN_BLOCK, Quantized


def fp8_max(dtype: torch.dtype) -> float:
    """Largest finite value of an e4m3 type (448 or 240)."""
    return torch.finfo(dtype).max


def supports(x: torch.Tensor, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether `quantize_tokens` can run on this input, and why not."""
    if dtype not in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
        return False, f"target dtype is {dtype}, expected float8_e4m3fn or float8_e4m3fnuz"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False, f"input dtype is {x.dtype}, expected bfloat16, float16 or float32"
    if x.dim() != 2 or x.shape[1] == 0 or x.shape[1] % TOKEN_BLOCK:
        return False, f"input shape is {tuple(x.shape)}, expected [T, a multiple of {TOKEN_BLOCK}]"
    if x.stride(1) != 1:
        return False, f"input strides are {x.stride()}, expected contiguous columns"
    return True, "ok"


def quantize_tokens(
    x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn, out: Quantized | None = None
) -> Quantized:
    """[T, H] bf16, f16 or f32 -> q [T, H] e4m3 and scale_inv [T, H / 128] float32, saturating.

    Raises ValueError with the reason when `supports` says no. Twin: `reference.quantize_tokens`, code for code.
    """
    supported, reason = supports(x, dtype)
    if not supported:
        raise ValueError(f"quantize_tokens: {reason}")
    num_tokens, hidden = x.shape
    num_blocks = hidden // TOKEN_BLOCK
    if out is None:
        out = Quantized(
            torch.empty(x.shape, dtype=dtype, device=x.device),
            torch.empty(num_tokens, num_blocks, dtype=torch.float32, device=x.device),
        )
    if num_tokens:
        _quantize_tokens_kernel[(num_tokens,)](
            x, out.q, out.scale_inv, x.stride(0), num_blocks,
            BLOCKS=triton.next_power_of_2(num_blocks), GROUP=TOKEN_BLOCK, FP8_MAX=fp8_max(dtype), MIN_AMAX=MIN_AMAX,
            num_warps=8,
        )  # fmt: skip
    return out


def to_fnuz(weight: torch.Tensor, scale_inv: torch.Tensor) -> Quantized:
    """An e4m3fn tensor and its block scales -> e4m3fnuz and scales that stand for exactly the same values.

    The same code means half as much in e4m3fnuz (its bias is one higher), so the scale doubles. Two codes have no such
    twin: 0x80 (-0 becomes +0, because fnuz reads it as NaN) and 0x7f / 0xff (NaN becomes fnuz's one NaN, 0x80; their
    bits would be the finite +-240).
    """
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"to_fnuz: weight dtype is {weight.dtype}, expected float8_e4m3fn")
    codes = weight.view(torch.uint8)
    is_nan = (codes & 0x7F) == 0x7F
    codes = codes.masked_fill(codes == 0x80, 0x00).masked_fill(is_nan, 0x80)
    return Quantized(codes.view(torch.float8_e4m3fnuz), scale_inv * 2.0)


@triton.jit
def quantize_block(x, FP8_MAX: tl.constexpr, MIN_AMAX: tl.constexpr):
    """[R, 128] float32 -> ([R, 128] float32 to be cast to e4m3 without overflow, [R] scales).

    x / scale is rounded correctly, so that every backend and the torch twin choose the same code: a multiplication by
    the inverse and one Newton correction (Markstein), at half the cost of a division. Of -0 it makes +0.
    """
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), MIN_AMAX)
    scale = tl.div_rn(amax, tl.full(amax.shape, FP8_MAX, tl.float32))
    inverse = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale)
    inverse = tl.broadcast_to(inverse[:, None], x.shape)
    q = x * inverse
    remainder = tl.fma(-q, tl.broadcast_to(scale[:, None], x.shape), x)
    q = tl.fma(remainder, inverse, q)
    return tl.minimum(tl.maximum(q, -FP8_MAX), FP8_MAX), scale


@triton.jit
def _quantize_tokens_kernel(
    x_ptr, q_ptr, scales_ptr, x_stride, num_blocks,
    BLOCKS: tl.constexpr, GROUP: tl.constexpr, FP8_MAX: tl.constexpr, MIN_AMAX: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    offsets = block[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = (block < num_blocks)[:, None]
    x = tl.load(x_ptr + token * x_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    q, scale = quantize_block(x, FP8_MAX, MIN_AMAX)
    tl.store(q_ptr + token * num_blocks * GROUP + offsets, q.to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(scales_ptr + token * num_blocks + block, scale, mask=block < num_blocks)

"""Triton's interpreter, made right where Triton 3.6 to 3.9 is wrong.

Its casts lose a rounding carry (float32 to FP8), truncate (float32 to bfloat16) and read NaN codes as numbers; 3.6
and 3.7 lack e4m3fnuz; its dot multiplies bfloat16 as integers; its fma rounds twice.
"""

from __future__ import annotations

import os
from typing import Any

TORCH_NAMES = {
    "fp8e4nv": "float8_e4m3fn",
    "fp8e4b8": "float8_e4m3fnuz",
    "fp8e5": "float8_e5m2",
    "fp8e5b16": "float8_e5m2fnuz",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
}


def install() -> None:
    """Import our kernels for the interpreter, with its mistakes mended. Children of this process are not concerned."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from triton.runtime import interpreter

        _mend(interpreter)
        import triton.experimental.gluon.language  # noqa: F401  (the interpreter imports it when it first runs)

        import ep.kernels.fused_moe
        import ep.kernels.gating
        import ep.kernels.p2p
        import ep.kernels.slots  # noqa: F401
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def _mend(interpreter: Any) -> None:
    import numpy as np
    import torch
    import triton.language as tl

    unsigned = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
    signed = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
    wrong_convert = interpreter._convert_float
    codes: dict[tuple[str, str], Any] = {}

    def cast(values: Any, source: Any, target: Any) -> Any:
        integers = torch.from_numpy(np.ascontiguousarray(values).view(unsigned[source.primitive_bitwidth]).copy())
        numbers = integers.view(getattr(torch, TORCH_NAMES[source.name])).to(getattr(torch, TORCH_NAMES[target.name]))
        return numbers.view(signed[target.primitive_bitwidth]).numpy().view(unsigned[target.primitive_bitwidth])

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        nearest = rounding is None or rounding == interpreter._ir.ROUNDING_MODE.RTNE
        if source.name not in TORCH_NAMES or target.name not in TORCH_NAMES or not nearest:
            return wrong_convert(values, source, target, rounding)
        if source.primitive_bitwidth != 8:
            return cast(values, source, target).reshape(values.shape)
        pair = (source.name, target.name)
        if pair not in codes:
            codes[pair] = cast(np.arange(256, dtype=np.uint8), source, target)
        return codes[pair][np.ascontiguousarray(values).view(np.uint8).reshape(values.shape)]

    builder = interpreter.InterpreterBuilder
    wrong_dot, wrong_fma = builder.create_dot, builder.create_fma

    def widened(handle: Any) -> Any:
        if handle.dtype.name != "bf16":
            return handle
        return interpreter.TensorHandle(
            convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32
        )

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return wrong_dot(self, widened(a), widened(b), *rest)

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if x.dtype.scalar != tl.float32:
            return wrong_fma(self, x, y, z)
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(np.float32), tl.float32)

    interpreter._convert_float = convert
    builder.create_dot, builder.create_fma = dot, fma
    if not hasattr(builder, "get_fp8e4b8_ty"):
        return
    patch_core = interpreter._patch_lang_core

    def patched(*args: Any, **kwargs: Any) -> Any:
        result = patch_core(*args, **kwargs)
        dtype = args[0].dtype
        to_ir = dtype.to_ir
        if not getattr(to_ir, "knows_fnuz", False):

            def with_fnuz(self: Any, ir_builder: Any) -> Any:
                if self.name == "fp8e4b8":
                    return ir_builder.get_fp8e4b8_ty()
                return to_ir(self, ir_builder)

            with_fnuz.knows_fnuz = True  # type: ignore[attr-defined]
            dtype.to_ir = with_fnuz
        return result

    interpreter._patch_lang_core = patched

"""Compiles kernels for a GPU that is not here with what their ops launch them with. For programs of their own, because
it cannot share a process with Triton's interpreter."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.int32: "*i32", torch.int64: "*i64", torch.float32: "*fp32", torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e4m3fnuz: "*fp8e4b8",
}  # fmt: skip
ALIGNED = ("_offset", "x_stride", "shard_stride", "local_stride", "scale_stride")
"""Ends of the names of integers that are multiples of 16."""


def record(arch: str, modules: dict[str, ModuleType]) -> list[dict[str, Any]]:
    """From now on a launch of these kernels compiles them for arch ("gfx942", "sm_90"); the list grows with what each
    uses. modules: by kernel, where its op looks for it."""
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    found: list[dict[str, Any]] = []
    for name, module in modules.items():
        setattr(module, name, Recorder(getattr(module, name), target, found))
    return found


class Recorder:
    """Stands in for a kernel: compiles what it is launched with instead of running it."""

    def __init__(self, kernel: Any, target: GPUTarget, found: list[dict[str, Any]]) -> None:
        self._kernel, self._target, self._found = kernel, target, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._compile

    def _compile(self, *operands: Any, **constants: Any) -> None:
        num_warps = constants.pop("num_warps", 4)
        names = self._kernel.arg_names
        signature, attributes, values = {}, {}, dict(constants)
        for position, (name, operand) in enumerate(zip(names, operands)):
            if operand is None:
                values[name] = None
            elif isinstance(operand, torch.Tensor):
                signature[name] = TYPES[operand.dtype]
                attributes[(position,)] = [["tt.divisibility", 16]]
            elif isinstance(operand, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i64" if name.endswith("_address") else "i32"
                if name.endswith(ALIGNED) and operand % 16 == 0:
                    attributes[(position,)] = [["tt.divisibility", 16]]
        signature = {name: signature.get(name, "constexpr") for name in names}
        source = ASTSource(fn=self._kernel, signature=signature, constexprs=values, attrs=attributes)
        compiled = triton.compile(source, target=self._target, options={"num_warps": num_warps})
        self._found.append({"kernel": self._kernel.__name__, **_read(compiled)})


def _read(compiled: Any) -> dict[str, Any]:
    """publishes: places at which all that was written before becomes visible to the whole system."""
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)
        assert spills is not None
        found: dict[str, Any] = {"spills": int(spills[1])}
        stores, loads = (rf"(?:global|flat|buffer)_{kind}_(\w+)" for kind in ("store", "load"))
        publishes = r"buffer_wbl2 sc0 sc1"
    else:
        assembly, found = compiled.asm["ptx"], {}
        stores, loads = r"st\.global\.(\S+)", r"ld\.\S*global\.(\S+)"
        publishes = r"atom\.global\.sys\.(?:release|acq_rel)"
    return {
        **found,
        "lds": compiled.metadata.shared,
        "stores": re.findall(stores, assembly),
        "loads": re.findall(loads, assembly),
        "publishes": len(re.findall(publishes, assembly)),
    }

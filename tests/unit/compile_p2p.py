"""Cross-compiles every kernel of the ipc data plane for a GPU that is not here and prints what it uses as JSON: a
program of its own, because it cannot share a process with Triton's interpreter.

    python tests/unit/compile_p2p.py gfx942 | sm_90
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ep.kernels import p2p

TYPES = {
    torch.int32: "*i32", torch.int64: "*i64", torch.float32: "*fp32", torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e4m3fnuz: "*fp8e4b8",
}  # fmt: skip
MODULES = {"dispatch_kernel": "p2p_router", "wait_kernel": "p2p_router", "combine_kernel": "p2p_router",
           "wait_and_combine_kernel": "p2p_router",
           "take_kernel": "p2p_shard", "collect_kernel": "p2p_shard",
           "return_kernel": "p2p_shard"}  # fmt: skip


class Recorder:
    """Stands in for a kernel: compiles what it is launched with instead of running it."""

    def __init__(self, kernel: Any, target: GPUTarget, found: list[dict[str, Any]]) -> None:
        self._kernel, self._target, self._found = kernel, target, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._compile

    def _compile(self, *operands: Any, **constants: Any) -> None:
        num_warps = constants.pop("num_warps")
        names = self._kernel.arg_names
        signature, attributes, values = {}, {}, dict(constants)
        for position, (name, operand) in enumerate(zip(names, operands)):
            if operand is None:
                values[name] = None
            elif isinstance(operand, torch.Tensor):
                signature[name] = TYPES[operand.dtype]
                attributes[(position,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "i64" if name.endswith("_address") else "i32"
                if name.endswith(("_offset", "x_stride", "shard_stride", "local_stride")):
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


def main(arch: str) -> list[dict[str, Any]]:
    """Every kernel as the ops launch it, at DeepSeek-V3's size and at Mixtral's."""
    is_amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if is_amd else GPUTarget("cuda", int(arch[3:]), 32)
    found: list[dict[str, Any]] = []
    for name in MODULES:
        setattr(p2p, name, Recorder(getattr(p2p, name), target, found))
    fp8 = torch.float8_e4m3fnuz if is_amd else torch.float8_e4m3fn
    for hidden, top_k, num_experts, dtype, partial_dtype in (
        (7168, 8, 256, fp8, torch.bfloat16), (4096, 2, 8, torch.bfloat16, torch.float32),
    ):  # fmt: skip
        for num_shards, rows in ((2, 8), (8, 512)):
            _launch_all(p2p.MessageShape(rows, hidden, top_k, dtype, partial_dtype), num_experts, num_shards)
    return found


def _launch_all(message: Any, num_experts: int, num_shards: int) -> None:
    rows, hidden, top_k = message.max_tokens, message.hidden, message.top_k
    cpu = torch.device("cpu")
    plan = p2p.Plan.allocate(rows, top_k, num_shards, cpu)
    tables = p2p.Tables(
        torch.zeros(2, num_experts, num_shards, dtype=torch.int32), torch.ones(2, num_experts, dtype=torch.int32), 4
    )
    words, addresses = torch.zeros(512, dtype=torch.int32), torch.zeros(8, dtype=torch.int64)
    ids, weights = torch.zeros(rows, top_k, dtype=torch.int32), torch.zeros(rows, top_k)
    x = torch.zeros(rows, hidden, dtype=torch.bfloat16)
    load = torch.zeros(2, 2, num_experts, dtype=torch.int64)
    p2p.dispatch_tokens(x, ids, weights, tables, plan, message, load, addresses, addresses, words, 0)
    flags = torch.zeros(num_shards, rows, dtype=torch.int32)
    p2p.wait_partials(plan, flags, words, 1, rows)
    partials = torch.zeros(num_shards, rows, hidden, dtype=message.partial_dtype)
    p2p.wait_and_combine(partials, plan, x, flags, words, 1)
    p2p.combine_partials(partials, plan, x)
    job = p2p.Job.allocate(message, rows, cpu)
    desk = p2p.Desk.allocate(8, cpu, 1)
    p2p.take(desk, message, 58, job, rows, 4096, 200, 1000, 96)
    p2p.collect(desk, message, job, rows)
    p2p.return_partials(partials[0], job, addresses, addresses, desk, rows)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))

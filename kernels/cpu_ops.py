"""vLLM's C++ ops for experts on CPU, loaded without importing vLLM.

Shape legend: T tokens, H hidden, N intermediate, E slots, K slots of each token.

`fused_experts_cpu` (vLLM's copy of SGLang's kernel) reads bf16 weights, or FP8 ones with 128 x 128 scales that it
widens in registers: half the memory, half the traffic. `cpu_fused_moe` is what vLLM itself runs for bf16 experts.
"""

from __future__ import annotations

import importlib.util
import platform
import threading
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

FusedPath = Literal["fp8", "bf16", "vllm"]
"""fp8 and bf16: fused_experts_cpu. vllm: cpu_fused_moe."""
ALIGNMENT = 32
"""H and N must be multiples of this for the ops' tiles."""
SCALE_BLOCK = (128, 128)
UNQUANTIZED, FP8_W8A16 = 0, 2
"""moe_comp_method: vllm._custom_ops.CPUQuantMethod."""

_op_lock = threading.Lock()
"""cpu_fused_moe has one scratch pad for the whole process: two threads in it at once overwrite each other's rows."""


def supports(
    path: FusedPath, hidden_size: int, moe_intermediate_size: int, block: tuple[int, int] | None = None
) -> tuple[bool, str]:
    """Whether `path` can be taken on this processor, and why (not). block: the scales' (rows, columns), for fp8."""
    shape = f"hidden {hidden_size} and intermediate {moe_intermediate_size}"
    if path == "fp8" and block != SCALE_BLOCK:
        return False, f"scale blocks are {block}, expected {SCALE_BLOCK}"
    aligned = SCALE_BLOCK[0] if path == "fp8" else ALIGNMENT
    if hidden_size % aligned or moe_intermediate_size % aligned:
        return False, f"{shape} are not multiples of {aligned}"
    missing = _load()
    if missing:
        return False, missing
    if path == "vllm":
        return True, f"vLLM's C++ op cpu_fused_moe ({isa()})"
    if not hasattr(torch.ops._C, "fused_experts_cpu"):
        return False, f"vLLM's {_library_name()} has no fused_experts_cpu"
    if not torch.cpu._is_avx512_bf16_supported():
        return False, "this processor has no AVX-512 BF16"
    if path == "bf16" and isa() == "amx":
        return False, "cpu_fused_moe uses this processor's AMX tiles"
    return True, f"vLLM's C++ op fused_experts_cpu ({'FP8' if path == 'fp8' else 'bf16'} weights)"


def pack(weights: torch.Tensor, path: FusedPath) -> None:
    """Reorders [E, rows, columns] in place, slot by slot: no second copy of a layer is ever held."""
    packed = torch.empty_like(weights[:1])
    for slot in weights.split(1):
        if path == "vllm":
            torch.ops._C.prepack_moe_weight(slot, packed, isa())
        else:
            packed = torch.ops._C.convert_weight_packed(slot)
        slot.copy_(packed)


def run(
    out: torch.Tensor,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor] | None,
    weights: torch.Tensor,
    slot_ids: torch.Tensor,
    path: FusedPath,
) -> None:
    """out [T, H] = the weighted sum of each token's slots.

    x [T, H] bf16, w13 [E, 2N, H] and w2 [E, H, N] as `pack` left them, scales of both for fp8, weights float32 [T, K],
    slot_ids int32 [T, K]: not checked, the ops index with them.
    """
    if path == "vllm":
        with _op_lock:
            torch.ops._C.cpu_fused_moe(out, x, w13, w2, None, None, weights, slot_ids, False, "silu", isa())
        return
    method, block = (UNQUANTIZED, None) if scales is None else (FP8_W8A16, list(SCALE_BLOCK))
    w13_scale, w2_scale = scales or (None, None)
    torch.ops._C.fused_experts_cpu(
        out, x, w13, w2, weights, slot_ids, method, w13_scale, w2_scale,
        None, None, None, block, None, None, None, None, True,
    )  # fmt: skip


@lru_cache(maxsize=1)
def isa() -> str:
    """As vLLM's CPU experts choose it. A process must ask Linux for the tiles before their first use: else SIGILL."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return "amx" if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx() else "vec"
    return {"aarch64": "neon", "arm64": "neon", "ppc64le": "vsx"}.get(machine, "vec")


def _library_name() -> str:
    """The one library that vLLM's CpuPlatform.import_kernels loads on this processor: two would clash."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "_C"
    if not torch.cpu._is_avx512_supported():
        return "_C_AVX2"
    return "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"


@lru_cache(maxsize=1)
def _load() -> str:
    """Registers the ops unless vLLM has done so already. Returns what is in the way, "" if nothing is."""
    if _has_op():
        return ""
    if torch.version.cuda or torch.version.hip:
        return "vLLM's CPU ops come with its CPU build only, and this torch is a GPU build"
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return "vLLM is not installed"
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob(f"{_library_name()}.*so"))
    if not files:
        return f"{folder} holds no {_library_name()}.*so"
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        return f"{files[0]} does not load: {error}"
    return "" if _has_op() else f"{files[0]} has no cpu_fused_moe"


def _has_op() -> bool:
    return hasattr(torch.ops._C, "cpu_fused_moe") and hasattr(torch.ops._C, "prepack_moe_weight")

"""Which implementation computes a shard's experts."""

from __future__ import annotations

import torch

from ep.compute import cpu
from ep.compute.base import ExpertCompute
from ep.errors import ModelError, OptionError
from ep.model import ModelSpec


def choose_device(device: torch.device | str | None = None) -> torch.device:
    """The device that is meant; without one the current GPU where torch can use one, else the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def keeps_quantized(spec: ModelSpec, device: torch.device, fp8: bool | None = None) -> bool:
    """Whether the layers that are added there are FP8 with scales rather than dequantised.

    fp8: what was asked for. None: an FP8 checkpoint's experts stay FP8 on a GPU; on a CPU they are dequantised, as
    native vLLM does, whose text they then repeat. Raises ModelError where FP8 is asked for and cannot be.
    """
    if device.type != "cpu" or fp8 is not True:
        return device.type != "cpu" and spec.quant_block is not None
    choice = cpu.choose(spec, torch.float8_e4m3fn)
    if choice.path != "fp8":
        raise ModelError(f"{spec.source}: experts cannot stay FP8 on this CPU: {choice.reason}")
    return True


def open_compute(
    spec: ModelSpec, num_slots: int, device: torch.device, max_tokens: int, for_router: bool = False
) -> ExpertCompute:
    """An empty ExpertCompute for num_slots slots per layer. max_tokens: the largest pass on a GPU; for_router: on a
    GPU, only GpuCompute.partials will be called.

    Raises ModelError where the device's kernels cannot run the model's experts, OptionError for another kind of device.
    """
    if device.type == "cpu":
        return cpu.CpuCompute(spec)
    if device.type != "cuda":
        raise OptionError(f"shard device is {device}, expected cpu or cuda")
    from ep.compute.gpu import GpuCompute  # Triton is needed only here
    from ep.kernels.devices import current_device

    return GpuCompute(spec, num_slots, device, current_device(device.index), max_tokens, for_router)

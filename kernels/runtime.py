"""Every call of the CUDA runtime and driver that the data plane needs, with its HIP counterpart beside it.

What PyTorch hides behind one name on both platforms (streams, graphs, `torch.cuda.cudart()`, whose functions are HIP's
on ROCm) is used under that name; the rest goes to the driver's own library.

    what                        CUDA                          HIP
    driver library              libcuda.so.1                  libamdhip64.so
    device address of host      cuMemHostGetDevicePointer_v2  hipHostGetDevicePointer
    memory
    captures of other     cuThreadExchangeStreamCaptureMode  hipThreadExchangeStreamCaptureMode
    threads
    memory that GPUs write      PyTorch's; cuMemAlloc in a    hipExtMallocWithFlags, uncached
    for each other              test (kernels/shared_memory.py)
    which GPUs a process sees   CUDA_VISIBLE_DEVICES          HIP_VISIBLE_DEVICES
    Ray leaves that alone       RAY_EXPERIMENTAL_NOSET_CUDA_  RAY_EXPERIMENTAL_NOSET_HIP_
                                VISIBLE_DEVICES               VISIBLE_DEVICES
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

HOST_REGISTER_FLAGS = 3
"""Portable and mapped: cudaHostRegisterPortable | cudaHostRegisterMapped, the same bits as HIP's."""

RELAXED = 2
"""cudaStreamCaptureModeRelaxed, the same number as HIP's."""

UNCACHED = 3
"""hipDeviceMallocUncached."""


@dataclass(frozen=True)
class MemoryCalls:
    """Names of the driver's functions. flags: of `allocate`, after the size; None where it takes none."""

    allocate: str
    flags: int | None
    free: str
    get_handle: str
    open_handle: str
    close_handle: str


@dataclass(frozen=True)
class Platform:
    """Names that differ. library: the driver's own. memory: how kernels/shared_memory.py has it, CUDA's as HIP's
    counterparts, by which the same code is tested on NVIDIA."""

    name: str
    library: str
    host_address: str
    capture_mode: str
    visible_devices: str
    ray_keeps_visible_devices: str
    memory: MemoryCalls


CUDA = Platform(
    name="cuda",
    library="libcuda.so.1",
    host_address="cuMemHostGetDevicePointer_v2",
    capture_mode="cuThreadExchangeStreamCaptureMode",
    visible_devices="CUDA_VISIBLE_DEVICES",
    ray_keeps_visible_devices="RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES",
    memory=MemoryCalls(
        allocate="cuMemAlloc_v2",
        flags=None,
        free="cuMemFree_v2",
        get_handle="cuIpcGetMemHandle",
        open_handle="cuIpcOpenMemHandle_v2",
        close_handle="cuIpcCloseMemHandle",
    ),
)
HIP = Platform(
    name="hip",
    library="libamdhip64.so",
    host_address="hipHostGetDevicePointer",
    capture_mode="hipThreadExchangeStreamCaptureMode",
    visible_devices="HIP_VISIBLE_DEVICES",
    ray_keeps_visible_devices="RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES",
    memory=MemoryCalls(
        allocate="hipExtMallocWithFlags",
        flags=UNCACHED,
        free="hipFree",
        get_handle="hipIpcGetMemHandle",
        open_handle="hipIpcOpenMemHandle",
        close_handle="hipIpcCloseMemHandle",
    ),
)


def platform() -> Platform:
    """Of the installed PyTorch; CUDA's where it has neither."""
    return HIP if torch.version.hip else CUDA


def register_host(address: int, num_bytes: int) -> int:
    """Pins host memory for every GPU of this process; its address as kernels use it. Raises RuntimeError."""
    check(torch.cuda.cudart().cudaHostRegister(address, num_bytes, HOST_REGISTER_FLAGS), "registering host memory")
    found = ctypes.c_void_p()
    call = getattr(driver(), platform().host_address)
    check(call(ctypes.byref(found), ctypes.c_void_p(address), ctypes.c_uint(0)), platform().host_address)
    return found.value or 0


def unregister_host(address: int) -> None:
    """The inverse, with the address on the host."""
    check(torch.cuda.cudart().cudaHostUnregister(address), "unregistering host memory")


def ignore_captures() -> None:
    """Lets this thread allocate and wait while another one captures a graph, which otherwise forbids both to all of
    them. Raises RuntimeError."""
    mode = ctypes.c_int(RELAXED)
    check(getattr(driver(), platform().capture_mode)(ctypes.byref(mode)), platform().capture_mode)


@cache
def driver() -> ctypes.CDLL:
    """The driver's own library, with a context on this thread."""
    torch.cuda.current_stream()
    return ctypes.CDLL(platform().library)


def check(result: Any, what: str) -> None:
    """Raises RuntimeError unless the result is success."""
    if int(result) != 0:
        raise RuntimeError(f"{platform().name}: {what} failed with error {int(result)}")

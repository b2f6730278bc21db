"""Every call of the CUDA runtime and driver that the data plane needs, with its HIP counterpart beside it.

What PyTorch hides behind one name on both platforms (streams, graphs, `torch.cuda.cudart()`, whose functions are HIP's
on ROCm) is used under that name; the rest goes to the driver's own library.

    what                        CUDA                          HIP
    driver library              libcuda.so.1                  libamdhip64.so
    device address of host      cuMemHostGetDevicePointer_v2  hipHostGetDevicePointer
    memory
    captures of other     cuThreadExchangeStreamCaptureMode  hipThreadExchangeStreamCaptureMode
    threads
    which GPUs a process sees   CUDA_VISIBLE_DEVICES          HIP_VISIBLE_DEVICES
    Ray leaves that alone       RAY_EXPERIMENTAL_NOSET_CUDA_  RAY_EXPERIMENTAL_NOSET_HIP_
                                VISIBLE_DEVICES               VISIBLE_DEVICES
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

HOST_REGISTER_FLAGS = 3
"""Portable and mapped: cudaHostRegisterPortable | cudaHostRegisterMapped, the same bits as HIP's."""

RELAXED = 2
"""cudaStreamCaptureModeRelaxed, the same number as HIP's."""

STORAGE_DEVICE = 6
"""Which argument of torch's rebuild_cuda_tensor is the device that the storage is opened on."""


@dataclass(frozen=True)
class Platform:
    """Names that differ. library: the driver's own."""

    name: str
    library: str
    host_address: str
    capture_mode: str
    visible_devices: str
    ray_keeps_visible_devices: str


CUDA = Platform(
    name="cuda",
    library="libcuda.so.1",
    host_address="cuMemHostGetDevicePointer_v2",
    capture_mode="cuThreadExchangeStreamCaptureMode",
    visible_devices="CUDA_VISIBLE_DEVICES",
    ray_keeps_visible_devices="RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES",
)
HIP = Platform(
    name="hip",
    library="libamdhip64.so",
    host_address="hipHostGetDevicePointer",
    capture_mode="hipThreadExchangeStreamCaptureMode",
    visible_devices="HIP_VISIBLE_DEVICES",
    ray_keeps_visible_devices="RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES",
)


def platform() -> Platform:
    """Of the installed PyTorch; CUDA's where it has neither."""
    return HIP if torch.version.hip else CUDA


@dataclass(frozen=True)
class SharedTensor:
    """What another process of this node needs to open a tensor of this one. Pickles."""

    rebuild: Callable[..., torch.Tensor]
    arguments: tuple[Any, ...]


def share(tensor: torch.Tensor) -> SharedTensor:
    """The tensor must outlive all use of the result."""
    from torch.multiprocessing.reductions import reduce_tensor

    return SharedTensor(*reduce_tensor(tensor))


def open_shared(shared: SharedTensor, device_index: int) -> torch.Tensor:
    """Maps another process's memory, on whichever GPU, into the context of this device: kernels there may use it.

    Left to itself PyTorch opens it in the context of the owner's device number, whose addresses kernels here may not
    use. Raises RuntimeError where the owner is gone or the GPUs cannot reach each other.
    """
    arguments = list(shared.arguments)
    arguments[STORAGE_DEVICE] = device_index
    return shared.rebuild(*arguments)


def register_host(address: int, num_bytes: int) -> int:
    """Pins host memory for every GPU of this process; its address as kernels use it. Raises RuntimeError."""
    _check(torch.cuda.cudart().cudaHostRegister(address, num_bytes, HOST_REGISTER_FLAGS), "registering host memory")
    found = ctypes.c_void_p()
    call = getattr(_driver(), platform().host_address)
    _check(call(ctypes.byref(found), ctypes.c_void_p(address), ctypes.c_uint(0)), platform().host_address)
    return found.value or 0


def unregister_host(address: int) -> None:
    """The inverse, with the address on the host."""
    _check(torch.cuda.cudart().cudaHostUnregister(address), "unregistering host memory")


def ignore_captures() -> None:
    """Lets this thread allocate and wait while another one captures a graph, which otherwise forbids both to all of
    them. Raises RuntimeError."""
    mode = ctypes.c_int(RELAXED)
    _check(getattr(_driver(), platform().capture_mode)(ctypes.byref(mode)), platform().capture_mode)


@cache
def _driver() -> ctypes.CDLL:
    torch.cuda.current_stream()  # there is a context on this thread
    return ctypes.CDLL(platform().library)


def _check(result: Any, what: str) -> None:
    if int(result) != 0:
        raise RuntimeError(f"{platform().name}: {what} failed with error {int(result)}")

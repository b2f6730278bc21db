"""Device memory that GPUs of one node write for each other while kernels run.

On NVIDIA that is PyTorch's. What PyTorch allocates on AMD is coarse-grained: kernels that run see what another GPU
writes there only after the next synchronisation (HIP's documentation, "Coherence control"), however they read it. So
there the memory is allocated uncached, as RCCL and MORI do it, and shared by HIP's own handles.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ep.kernels import runtime
from ep.kernels.runtime import MemoryCalls

HANDLE_BYTES = 64
"""Of a hipIpcMemHandle_t, and of a CUipcMemHandle."""
ENABLE_PEERS = 1
"""hipIpcMemLazyEnablePeerAccess, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS."""
STORAGE_DEVICE = 6
"""Which argument of torch's rebuild_cuda_tensor is the device that the storage is opened on."""


class Handle(ctypes.Structure):
    """Passed by value."""

    _fields_ = [("data", ctypes.c_ubyte * HANDLE_BYTES)]


@dataclass(frozen=True)
class SharedTensor:
    """What another process of this node needs to open a tensor of this one: PyTorch's, or a handle of so many bytes.
    Pickles."""

    arguments: tuple[Any, ...] = ()
    rebuild: Callable[..., torch.Tensor] | None = None
    handle: bytes = b""
    num_bytes: int = 0


class Mapped(Protocol):
    """Memory that kernels here may use while this is kept."""

    def data_ptr(self) -> int:
        """Its address."""
        ...


def zeros(num_bytes: int, device: torch.device) -> torch.Tensor:
    """uint8 that may be shared."""
    if runtime.platform() is runtime.CUDA:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        tensor = Memory.allocate(runtime.driver(), runtime.HIP.memory, num_bytes).tensor(device).zero_()
        torch.cuda.synchronize(device)
    return tensor


def share(tensor: torch.Tensor) -> SharedTensor:
    """tensor: of `zeros`; it must outlive all use of the result."""
    if runtime.platform() is runtime.CUDA:
        from torch.multiprocessing.reductions import reduce_tensor

        rebuild, arguments = reduce_tensor(tensor)
        return SharedTensor(arguments, rebuild)
    handle = get_handle(runtime.driver(), runtime.HIP.memory, tensor.data_ptr())
    return SharedTensor(handle=handle, num_bytes=tensor.nbytes)


def open_shared(shared: SharedTensor, device_index: int) -> Mapped:
    """Maps another process's memory, on whichever GPU, into the context of this device: kernels there may use it.

    Left to itself PyTorch opens it in the context of the owner's device number, whose addresses kernels here may not
    use. Raises RuntimeError where the owner is gone or the GPUs cannot reach each other.
    """
    if shared.rebuild is not None:
        arguments = list(shared.arguments)
        arguments[STORAGE_DEVICE] = device_index
        return shared.rebuild(*arguments)
    with torch.cuda.device(device_index):
        return Memory.open(runtime.driver(), runtime.HIP.memory, shared.handle, shared.num_bytes)


class Memory:
    """Device memory of the driver's, given back with the last that refers to it. Raises RuntimeError."""

    def __init__(self, address: int, num_bytes: int, give_back: Callable[[int], Any]) -> None:
        self.num_bytes = num_bytes
        self._address, self._give_back = address, give_back

    def data_ptr(self) -> int:
        return self._address

    @classmethod
    def allocate(cls, driver: Any, calls: MemoryCalls, num_bytes: int) -> Memory:
        """In the context of the current device; uncached where `calls` say so, and not set to anything."""
        flags = () if calls.flags is None else (ctypes.c_uint(calls.flags),)
        address = _find(driver, calls.allocate, ctypes.c_size_t(num_bytes), *flags)
        return cls(address, num_bytes, lambda at: getattr(driver, calls.free)(ctypes.c_void_p(at)))

    @classmethod
    def open(cls, driver: Any, calls: MemoryCalls, handle: bytes, num_bytes: int) -> Memory:
        """Memory of another process, mapped into the context of the current device."""
        passed = Handle.from_buffer_copy(handle)
        address = _find(driver, calls.open_handle, passed, ctypes.c_uint(ENABLE_PEERS))
        return cls(address, num_bytes, lambda at: getattr(driver, calls.close_handle)(ctypes.c_void_p(at)))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.num_bytes,), "typestr": "|u1", "data": (self._address, False), "version": 3}

    def tensor(self, device: torch.device) -> torch.Tensor:
        """uint8, where this lies on that device; keeps it."""
        tensor = torch.as_tensor(self, device=device)
        assert tensor.data_ptr() == self._address, "PyTorch made a copy"
        return tensor

    def __del__(self) -> None:
        self._give_back(self._address)


def get_handle(driver: Any, calls: MemoryCalls, address: int) -> bytes:
    """By which another process opens memory that was allocated at this address. Raises RuntimeError."""
    handle = Handle()
    runtime.check(getattr(driver, calls.get_handle)(ctypes.byref(handle), ctypes.c_void_p(address)), calls.get_handle)
    return bytes(handle.data)


def _find(driver: Any, name: str, *operands: Any) -> int:
    """The address that a function of the driver gives."""
    found = ctypes.c_void_p()
    runtime.check(getattr(driver, name)(ctypes.byref(found), *operands), name)
    return found.value or 0

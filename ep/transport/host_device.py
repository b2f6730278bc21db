"""The processor of this machine in the place of a GPU: what the ipc transport does, without one.

Kernels are their torch twins (kernels/p2p_reference.py), each run to its end where it is launched; memory that another
process may open lies in a file without a name. Routers and shards of a machine without GPUs can so take every step that
those on GPUs take, messages, flags and failures included.
"""

from __future__ import annotations

import mmap
import os
import time
import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch

from ep.transport.ipc_device import Launch, TensorHandle

SPIN_S, NAP_S = 2e-4, 5e-5
"""How long a wait looks again at once, and how long it then sleeps between two looks."""

_shared: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()
_files: dict[int, int] = {}
"""By address of the memory."""


class HostDevice:
    """An IpcDevice."""

    torch_device = torch.device("cpu")

    def use(self) -> None:
        """Any thread may launch."""

    def shared_zeros(self, num_bytes: int) -> torch.Tensor:
        file = os.memfd_create("ep-ipc", os.MFD_CLOEXEC)
        os.ftruncate(file, num_bytes)
        tensor = _map(file, num_bytes)
        address = tensor.data_ptr()
        _shared[address], _files[address] = tensor, file
        weakref.finalize(tensor, _forget, address)
        return tensor

    def share(self, tensor: torch.Tensor) -> TensorHandle:
        address = tensor.data_ptr()
        return TensorHandle(os.getpid(), address, f"/proc/{os.getpid()}/fd/{_files[address]}")

    def open(self, handle: TensorHandle) -> torch.Tensor:
        if handle.pid == os.getpid():
            return _shared[handle.address]
        assert isinstance(handle.shared, str)
        try:
            file = os.open(handle.shared, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise RuntimeError(f"{handle.shared}: memory of process {handle.pid} cannot be opened: {error}") from error
        try:
            return _map(file, os.fstat(file).st_size)
        finally:
            os.close(file)

    def map_host(self, address: int, num_bytes: int) -> int:
        return address

    def unmap_host(self, address: int) -> None:
        """Nothing was mapped."""

    def host_words(self, num_words: int) -> torch.Tensor:
        return torch.zeros(num_words, dtype=torch.int32)

    def launch(self, op: Callable[..., Any], *operands: Any) -> None:
        from ep.kernels import p2p_reference  # needs Triton

        twin, since = getattr(p2p_reference, op.__name__), time.perf_counter()
        while twin(*operands) is False:
            if time.perf_counter() - since < SPIN_S:
                os.sched_yield()
            else:
                time.sleep(NAP_S)

    def capture(self, work: Launch) -> Launch:
        return work

    @property
    def is_capturing(self) -> bool:
        return False

    def mark(self) -> Callable[[], bool]:
        return lambda: True

    def hold(self, until: Callable[[], bool]) -> None:
        """What was launched is done."""

    def synchronize(self) -> None:
        """Likewise."""

    def drain(self) -> None:
        """Likewise: whoever asks holds no lock that a launch needs."""


def _map(file: int, num_bytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(file, num_bytes), dtype=torch.uint8)


def _forget(address: int) -> None:
    os.close(_files.pop(address))

"""What the ipc transport asks of a GPU, so that everything else about it also runs without one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch

from ep.kernels import runtime, shared_memory
from ep.kernels.shared_memory import Mapped, SharedTensor

Launch = Callable[[], None]
HOLD_NAP_S = 2e-5
"""Leaves the interpreter to a shard of this process."""


@dataclass(frozen=True)
class TensorHandle:
    """A tensor of a device's memory for processes of the same node; pickles. The owner keeps the tensor while it is
    used. shared: what opens it in another process, a path for host memory."""

    pid: int
    address: int
    shared: SharedTensor | str | None


class IpcDevice(Protocol):
    """One GPU, and the stream of the thread that uses this."""

    @property
    def torch_device(self) -> torch.device: ...

    def use(self) -> None:
        """To be called once on a thread that is to launch."""
        ...

    def shared_zeros(self, num_bytes: int) -> torch.Tensor:
        """uint8 zeros that may be shared."""
        ...

    def share(self, tensor: torch.Tensor) -> TensorHandle:
        """tensor: of `shared_zeros`."""
        ...

    def open(self, handle: TensorHandle) -> Mapped:
        """Memory of another GPU or process as kernels here use it. Raises RuntimeError."""
        ...

    def map_host(self, address: int, num_bytes: int) -> int:
        """Lets kernels use host memory; its address there."""
        ...

    def unmap_host(self, address: int) -> None: ...

    def host_words(self, num_words: int) -> torch.Tensor:
        """int32 zeros in host memory that kernels may use under the same address."""
        ...

    def launch(self, op: Callable[..., Any], *operands: Any) -> None:
        """Queues an op of kernels/p2p.py or of the experts."""
        ...

    def capture(self, work: Launch) -> Launch:
        """work, which only launches, as something that queues all of it at once."""
        ...

    @property
    def is_capturing(self) -> bool:
        """Whether what this thread launches is being captured."""
        ...

    def mark(self) -> Callable[[], bool]:
        """Whether everything that this thread has queued until now is done, whenever it is called."""
        ...

    def hold(self, until: Callable[[], bool]) -> None:
        """Returns when this is so, which the device and others that use it see to."""
        ...

    def synchronize(self) -> None:
        """Waits for everything that this thread queued."""
        ...

    def drain(self) -> None:
        """Waits for everything that was queued, by whichever thread."""
        ...


class GpuDevice:
    """An NVIDIA or AMD GPU, by way of PyTorch. own_stream: launches go to a stream of their own instead of the current
    one, beside what else the process does."""

    def __init__(self, index: int, own_stream: bool = False) -> None:
        self.torch_device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self.torch_device) if own_stream else None

    def use(self) -> None:
        torch.cuda.set_device(self.torch_device)
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)
            runtime.ignore_captures()

    def shared_zeros(self, num_bytes: int) -> torch.Tensor:
        return shared_memory.zeros(num_bytes, self.torch_device)

    def share(self, tensor: torch.Tensor) -> TensorHandle:
        _shared_here[tensor.data_ptr()] = tensor
        return TensorHandle(os.getpid(), tensor.data_ptr(), shared_memory.share(tensor))

    def open(self, handle: TensorHandle) -> Mapped:
        if handle.pid == os.getpid():  # a process cannot map its own memory a second time
            return _shared_here[handle.address]
        assert isinstance(handle.shared, SharedTensor)
        try:
            return shared_memory.open_shared(handle.shared, self.torch_device.index)
        except RuntimeError as error:
            reason = f"{self.torch_device} cannot use memory of process {handle.pid}: {error}"
            raise RuntimeError(f"{reason} (--transport socket needs none)") from error

    def map_host(self, address: int, num_bytes: int) -> int:
        users, mapped = _registered.get(address, (0, 0))
        if not users:
            mapped = runtime.register_host(address, num_bytes)
        _registered[address] = (users + 1, mapped)
        return mapped

    def unmap_host(self, address: int) -> None:
        users, mapped = _registered.pop(address)
        if users > 1:
            _registered[address] = (users - 1, mapped)
        else:
            runtime.unregister_host(address)

    def host_words(self, num_words: int) -> torch.Tensor:
        return torch.zeros(num_words, dtype=torch.int32).pin_memory()

    def launch(self, op: Callable[..., Any], *operands: Any) -> None:
        op(*operands)

    def capture(self, work: Launch) -> Launch:
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may launch and allocate meanwhile.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            work()
        return graph.replay

    @property
    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def mark(self) -> Callable[[], bool]:
        event = torch.cuda.Event()
        event.record()
        return event.query

    def hold(self, until: Callable[[], bool]) -> None:
        while not until():
            time.sleep(HOLD_NAP_S)

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.torch_device).synchronize()

    def drain(self) -> None:
        torch.cuda.synchronize(self.torch_device)


_shared_here: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()
_registered: dict[int, tuple[int, int]] = {}
"""Of host memory that is mapped: how often, and its address for kernels."""

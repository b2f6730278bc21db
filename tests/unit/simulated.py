"""A GPU that is none: kernels are their torch twins, queued and run in order when the test says so."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from ep.kernels import p2p, p2p_reference
from ep.kernels.p2p import Job
from ep.kernels.p2p_layout import MessageShape
from ep.placement import Placement
from ep.transport.ipc_device import Launch, TensorHandle

SYNCHRONIZE_S = 10.0


class SimulatedDevice:
    """An IpcDevice with one stream. `step` runs the oldest op, unless that is a wait that is not over."""

    torch_device = torch.device("cpu")
    _memory: dict[int, torch.Tensor] = {}  # noqa: RUF012  (of all devices: any process may open it)

    def __init__(self) -> None:
        self._queue: deque[Callable[[], Any]] = deque()
        self._captured: list[Callable[[], Any]] | None = None
        self._runs = threading.Lock()

    def use(self) -> None:
        """Any thread may launch."""

    def shared_zeros(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def share(self, tensor: torch.Tensor) -> TensorHandle:
        self._memory[tensor.data_ptr()] = tensor
        return TensorHandle(os.getpid(), tensor.data_ptr(), None)

    def open(self, handle: TensorHandle) -> torch.Tensor:
        return self._memory[handle.address]

    def map_host(self, address: int, num_bytes: int) -> int:
        return address

    def unmap_host(self, address: int) -> None:
        pass

    def host_words(self, num_words: int) -> torch.Tensor:
        return torch.zeros(num_words, dtype=torch.int32)

    def launch(self, op: Callable[..., Any], *operands: Any) -> None:
        if getattr(p2p, op.__name__, None) is op:
            op = getattr(p2p_reference, op.__name__)
        target = self._queue if self._captured is None else self._captured
        target.append(lambda: op(*operands))

    def capture(self, work: Launch) -> Launch:
        self._captured = []
        work()
        captured, self._captured = self._captured, None
        return lambda: self._queue.extend(captured)

    @property
    def is_idle(self) -> bool:
        return not self._queue

    def step(self) -> bool:
        """Whether an op ran to its end. From any thread."""
        with self._runs:
            if not self._queue or self._queue[0]() is False:
                return False
            self._queue.popleft()
            return True

    def run(self) -> None:
        """Until everything is done or a wait is not over."""
        while self.step():
            pass

    @property
    def is_capturing(self) -> bool:
        return self._captured is not None

    def mark(self) -> Callable[[], bool]:
        is_done: list[bool] = []
        self._queue.append(lambda: is_done.append(True))
        return lambda: bool(is_done)

    def hold(self, until: Callable[[], bool]) -> None:
        """Left to the test, which may put another in its place."""

    def synchronize(self) -> None:
        deadline = time.monotonic() + SYNCHRONIZE_S
        while not self.is_idle:
            if not self.step():
                assert time.monotonic() < deadline, "a wait does not end"
                time.sleep(1e-4)

    drain = synchronize


def factors(num_layers: int, num_experts: int) -> torch.Tensor:
    """What an expert multiplies its tokens by, float32 [L, E]: another for every layer and expert."""
    return torch.arange(1, num_layers * num_experts + 1).view(num_layers, num_experts).float() / 8


class SimulatedExperts:
    """A JobCompute of one shard's slots: an expert multiplies by its factor."""

    def __init__(self, device: SimulatedDevice, placement: Placement, shard_idx: int) -> None:
        self._device, self._shard_idx = device, shard_idx
        self.fill(placement)

    def fill(self, placement: Placement) -> None:
        """Other experts in the same slots, while none of them is asked."""
        slots = torch.from_numpy(placement.slots[:, self._shard_idx].copy())
        table = factors(placement.num_moe_layers, placement.num_experts)
        self._factors = torch.where(slots >= 0, table.gather(1, slots.clamp(min=0).long()), float("nan"))

    def __call__(self, job: Job, capacity: int, out: torch.Tensor) -> None:
        self._device.launch(self._run, job, capacity, out)

    def _run(self, job: Job, capacity: int, out: torch.Tensor) -> None:
        num_tokens = int(job.num_tokens)
        assert num_tokens <= capacity
        slots = job.slot_ids[:num_tokens]
        scale = self._factors[int(job.layer_idx)][slots.clamp(min=0).long()] * job.weights[:num_tokens]
        total = torch.where(slots >= 0, scale, 0).sum(1, keepdim=True)
        out[:num_tokens] = job.rows[:num_tokens].float() * total


def message_shape(max_tokens: int = 16, top_k: int = 2) -> MessageShape:
    return MessageShape(max_tokens, 128, top_k, torch.bfloat16, torch.float32)

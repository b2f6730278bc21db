"""The driver's own memory, as it is used on AMD, between two processes of one GPU."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from ep.kernels import runtime, shared_memory
from ep.kernels.shared_memory import Memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NUM_BYTES = 3 << 20


def add_one(handle: bytes) -> None:
    """In another process."""
    torch.cuda.set_device(0)
    memory = Memory.open(runtime.driver(), runtime.platform().memory, handle, NUM_BYTES).tensor(torch.device("cuda", 0))
    assert (memory == 3).all()
    memory += 1
    torch.cuda.synchronize()


def test_another_process_writes_into_it() -> None:
    torch.cuda.set_device(0)
    allocated = Memory.allocate(runtime.driver(), runtime.platform().memory, NUM_BYTES)
    memory = allocated.tensor(torch.device("cuda", 0)).fill_(3)
    torch.cuda.synchronize()
    handle = shared_memory.get_handle(runtime.driver(), runtime.platform().memory, memory.data_ptr())
    process = multiprocessing.get_context("spawn").Process(target=add_one, args=(handle,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert (memory == 4).all()

"""Device memory of HIP's, shared by its handles: the calls as a library of this machine's compiler gets them, which
answers as HIP does, with host memory. Names, order and sizes of operands are those of HIP's headers."""

from __future__ import annotations

import ctypes
import pickle
import shutil
import subprocess

import pytest

from ep.kernels import runtime, shared_memory
from ep.kernels.runtime import MemoryCalls
from ep.kernels.shared_memory import Memory, SharedTensor, get_handle
from ep.transport.ipc_device import GpuDevice, TensorHandle

HIP = runtime.HIP.memory
SOURCE = """
#include <stdlib.h>
#include <string.h>
typedef struct { char reserved[64]; } hipIpcMemHandle_t;
static long live, opened, flags_seen;
int hipExtMallocWithFlags(void **ptr, size_t size, unsigned int flags) {
    flags_seen = flags;
    if (size > (1ul << 40)) return 2;
    live++; *ptr = malloc(size); return 0;
}
int hipFree(void *ptr) { live--; free(ptr); return 0; }
int hipIpcGetMemHandle(hipIpcMemHandle_t *handle, void *ptr) {
    memset(handle, 0x5a, sizeof *handle); memcpy(handle->reserved + 8, &ptr, sizeof ptr); return 0;
}
int hipIpcOpenMemHandle(void **ptr, hipIpcMemHandle_t handle, unsigned int flags) {
    if (handle.reserved[0] != 0x5a || handle.reserved[63] != 0x5a || flags != 1) return 1;
    memcpy(ptr, handle.reserved + 8, sizeof *ptr); opened++; return 0;
}
int hipIpcCloseMemHandle(void *ptr) { opened--; return 0; }
long count(int what) { return what == 0 ? live : what == 1 ? opened : flags_seen; }
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("hip")
    (folder / "hip.c").write_text(SOURCE)
    library = folder / "libhip.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "hip.c"], check=True)
    return ctypes.CDLL(str(library))


def test_memory_is_uncached_and_given_back(driver: ctypes.CDLL) -> None:
    memory = Memory.allocate(driver, HIP, 4096)
    assert (driver.count(0), driver.count(2)) == (1, runtime.UNCACHED)
    ctypes.memset(memory.data_ptr(), 7, 4096)
    assert memory.__cuda_array_interface__["data"] == (memory.data_ptr(), False)
    handle = get_handle(driver, HIP, memory.data_ptr())
    shared = pickle.loads(pickle.dumps(SharedTensor(handle=handle, num_bytes=memory.num_bytes)))
    opened = Memory.open(driver, HIP, shared.handle, shared.num_bytes)
    assert opened.data_ptr() == memory.data_ptr() and driver.count(1) == 1
    assert ctypes.string_at(opened.data_ptr(), 4096) == b"\7" * 4096
    del opened
    assert (driver.count(0), driver.count(1)) == (1, 0)
    del memory
    assert driver.count(0) == 0


def test_what_the_driver_refuses_is_an_error(driver: ctypes.CDLL) -> None:
    with pytest.raises(RuntimeError, match="hipExtMallocWithFlags failed with error 2"):
        Memory.allocate(driver, HIP, 1 << 50)
    with pytest.raises(RuntimeError, match="hipIpcOpenMemHandle failed with error 1"):
        Memory.open(driver, HIP, bytes(shared_memory.HANDLE_BYTES), 1)


def test_both_platforms_have_every_call() -> None:
    assert set(vars(HIP)) == set(vars(runtime.CUDA.memory)) == set(MemoryCalls.__dataclass_fields__)
    assert all(name.startswith("hip") for key, name in vars(HIP).items() if key != "flags")


def test_gpus_that_cannot_reach_each_other_are_named_with_a_way_out() -> None:
    def refuse(*arguments: int) -> None:
        raise RuntimeError("peer access is not supported between these two devices")

    handle = TensorHandle(4242, 0, SharedTensor((0,) * 8, refuse))
    with pytest.raises(RuntimeError, match=r"cuda:1 cannot use memory of process 4242: peer .* \(--transport socket"):
        GpuDevice(1).open(handle)

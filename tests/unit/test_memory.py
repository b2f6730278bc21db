"""Memory over time: what is read, and what counts as growth."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from ep.bench.memory import MemorySampler, ProcessMemory, growths, own_mib

MIB = 1 << 20


def test_own_memory_is_what_is_written_not_what_is_mapped() -> None:
    before = own_mib(os.getpid())
    with mmap.mmap(-1, 64 * MIB) as memory:
        assert own_mib(os.getpid()) == pytest.approx(before, abs=2)
        memory.write(b"x" * (32 * MIB))
        assert own_mib(os.getpid()) == pytest.approx(before + 32, abs=2)
    with Path("/proc/self/exe").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        sum(mapped[::4096])
        assert own_mib(os.getpid()) == pytest.approx(before, abs=2)


def test_growth_is_from_the_end_of_the_warm_up_to_the_end() -> None:
    times = [10.0 * i for i in range(100)]
    warming = ProcessMemory("warming", 1, 0, tuple(np.concatenate([np.linspace(50, 100, 20), np.full(80, 100.0)])))
    leaking = ProcessMemory("leaking", 2, 5, tuple(np.linspace(100, 110, 95)))
    late = ProcessMemory("late", 3, 30, (1.0,) * 70)
    gone = ProcessMemory("gone", 4, 0, (1.0,) * 90)
    found = growths(times, [warming, leaking, late, gone], warm_up_s=200)
    assert [one.name for one in found] == ["leaking", "warming"], "only who was there all the time is judged"
    assert found[1].growth == 0
    part = np.linspace(100, 110, 95)[15:]
    expected = np.median(part[-16:]) / np.median(part[:16]) - 1
    assert found[0].growth == pytest.approx(expected, abs=1e-4) and found[0].growth > 0.05


def test_a_process_that_ends_is_sampled_until_then() -> None:
    child = psutil.Popen(["sleep", "60"])
    sampler = MemorySampler(lambda: [psutil.Process(), child], lambda process: process.name(), period_s=0.02)
    sampler.start()
    while len(sampler.times) < 5:
        time.sleep(0.01)
    child.kill()
    child.wait()
    while len(sampler.times) < 10:
        time.sleep(0.01)
    sampler.stop()
    mine, its = sorted(sampler.processes(), key=lambda process: process.pid != os.getpid())
    assert (mine.pid, its.pid) == (os.getpid(), child.pid)
    assert 4 <= len(its.mib) < len(mine.mib) and len(mine.mib) == len(sampler.times)

"""Memory of many processes over time, and whether it grows."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

_OWN = re.compile(r"^Pss_(?:Anon|Shmem): +(\d+) kB$", re.MULTILINE)
_PART = 0.2


@dataclass(frozen=True)
class ProcessMemory:
    """One process. mib: of its own memory at times[first:]; first: index of the first sample that it was seen in."""

    name: str
    pid: int
    first: int
    mib: tuple[float, ...]


@dataclass(frozen=True)
class Growth:
    """Of the own memory of a process that ran from the end of the warm-up to the end.

    before_mib, after_mib: medians of the first and the last fifth of that time. growth: after over before, minus 1.
    """

    name: str
    pid: int
    before_mib: float
    after_mib: float
    growth: float


class MemorySampler:
    """Reads every process that `find` gives, every period_s, in a thread, from `start` to `stop`."""

    def __init__(
        self,
        find: Callable[[], Iterable[psutil.Process]],
        name: Callable[[psutil.Process], str],
        period_s: float,
    ) -> None:
        self.times: list[float] = []
        self._find, self._name, self._period_s = find, name, period_s
        self._series: dict[tuple[int, float], tuple[str, int, list[float]]] = {}
        self._since = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="memory")

    def start(self) -> None:
        self._since = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def processes(self) -> tuple[ProcessMemory, ...]:
        return tuple(
            ProcessMemory(name, pid, first, tuple(series)) for (pid, _), (name, first, series) in self._series.items()
        )

    def _run(self) -> None:
        while not self._ended.wait(max(0.0, self._since + len(self.times) * self._period_s - time.monotonic())):
            self.times.append(round(time.monotonic() - self._since, 1))
            for process in self._find():
                try:
                    key, mib = (process.pid, process.create_time()), own_mib(process.pid)
                    if key not in self._series:
                        self._series[key] = (self._name(process), len(self.times) - 1, [])
                    self._series[key][2].append(mib)
                except (psutil.Error, OSError):  # ended meanwhile
                    continue


def own_mib(pid: int) -> float:
    """Memory that would be free without this process: anonymous, and its share of what is shared. Mapped files are left
    out: how much of them counts depends on who else maps them. Raises OSError."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    return round(sum(int(kib) for kib in _OWN.findall(text)) / 1024, 2)


def growths(times: list[float], processes: Iterable[ProcessMemory], warm_up_s: float) -> list[Growth]:
    """Of the processes that were there all the time after warm_up_s, the one that grew most first."""
    warm = int(np.searchsorted(times, warm_up_s))
    found = []
    for process in processes:
        if process.first > warm or process.first + len(process.mib) < len(times):
            continue
        mib = np.array(process.mib[warm - process.first :])
        part = max(1, int(_PART * len(mib)))
        before, after = float(np.median(mib[:part])), float(np.median(mib[-part:]))
        found.append(Growth(process.name, process.pid, round(before, 2), round(after, 2), round(after / before - 1, 4)))
    return sorted(found, key=lambda growth: -growth.growth)

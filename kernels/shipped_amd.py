"""The tuned files for AMD that nobody has measured yet: chosen by rule, kept when they compile well.

`python -m ep.kernels.shipped_amd FOLDER` writes them anew; they say in their provenance how they were made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import triton

from ep.kernels.devices import Device
from ep.kernels.resources import Resources, compile_for_amd
from ep.kernels.tuning import TileConfig, default_config, default_tile, file_name, provenance_path

DEVICES = (
    Device("AMD_Instinct_MI300X", "gfx942", units=304, shared_bytes=64 << 10, pci_id=0x74A1),
    Device("AMD_Instinct_MI308X", "gfx942", units=80, shared_bytes=64 << 10, pci_id=0x74A2),
)
HIDDEN, INTERMEDIATE = 7168, 2048
SLOTS = (4, 8, 9, 16, 18, 32, 33, 36, 64, 128, 256)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 8192, 16384)


def choose(rows_per_slot: float, device: Device, compiled: dict[TileConfig, tuple[Resources, Resources]]) -> TileConfig:
    """The rule's tile, or the next smaller one that its resources do not forbid. Fills `compiled`."""
    config = default_config(rows_per_slot, device)
    while (problem := find_problem(config, device, compiled)) is not None:
        if config.block_m == 16:
            raise RuntimeError(f"{device.name}: no tile compiles well: {problem}")
        config = default_tile(config.block_m // 2, device)
    return config


def find_problem(
    config: TileConfig, device: Device, compiled: dict[TileConfig, tuple[Resources, Resources]]
) -> str | None:
    """Why a tile cannot be shipped, or None. What its GEMMs use is put into `compiled`."""
    key = TileConfig(**{**vars(config), "group_m": 1})  # a run-time argument of the kernel
    if key not in compiled:
        dtype = device.fp8_dtype or torch.float8_e4m3fnuz
        gate_up, down = (
            compile_for_amd(key, device.arch, dtype, HIDDEN, INTERMEDIATE, swiglu=swiglu) for swiglu in (True, False)
        )
        compiled[key] = gate_up, down
    return next((p for used in compiled[key] if (p := used.problem(device.shared_bytes)) is not None), None)


def write(folder: Path) -> None:
    """Writes every file of DEVICES x SLOTS."""
    compiled: dict[TileConfig, tuple[Resources, Resources]] = {}
    for device in DEVICES:
        for slots in SLOTS:
            entries = {str(tokens): choose(tokens / slots, device, compiled).to_vllm() for tokens in TOKENS}
            path = folder / file_name(slots, INTERMEDIATE, device.name)
            path.write_text(json.dumps(entries, indent=4) + "\n")
            provenance = {
                "how": "not measured: chosen by rule (row block nearest to tokens per slot), and rejected where "
                "cross-compiling showed spilled registers, more than 64 KiB of LDS or emulated FP8",
                "device": device.name,
                "pci_id": f"0x{device.pci_id:04x}",
                "versions": {"triton": triton.__version__},
                "hidden_size": HIDDEN,
            }
            provenance_path(path).write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))

"""Tuned tile sizes: the files, how they are found, and what stands in where there is none.

Names and keys are vLLM's, so that either project reads the other's files (VLLM_TUNED_CONFIG_FOLDER):
`E={slots},N={moe_intermediate},device_name={name},dtype=fp8_w8a8,block_shape=[128,128].json`, and in it, per number of
tokens, BLOCK_SIZE_M/N/K, GROUP_SIZE_M, num_warps and num_stages, on AMD also waves_per_eu, matrix_instr_nonkdim and
kpack. What was measured, on what and when lies beside it in `*.provenance.json`, because vLLM's reader takes every
key for a number of tokens. A number of tokens counts the rows that reach the shard: T tokens with about one slot each.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ep.kernels.devices import Device

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent.parent / "configs" / "moe"
"""The project's own files."""

USER_FOLDER_VARIABLE = "VLLM_TUNED_CONFIG_FOLDER"
SAME_CHIP = {"NVIDIA_H100_80GB_HBM3": "NVIDIA_H200"}
"""Whose files stand in for those of a device that has none: all of it but the memory is the same."""

FILE_NAME = re.compile(
    r"E=(?P<slots>\d+),N=(?P<inter>\d+),device_name=(?P<device>[^,]+)(?P<fp8>,dtype=fp8_w8a8,block_shape=\[128,128\])?\.json"
)
UNEVEN = 1.5
"""How many times the mean a slot's rows may be for the rule's block to hold them."""

REQUIRED_KEYS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
AMD_KEYS = ("waves_per_eu", "matrix_instr_nonkdim", "kpack")
IGNORED_KEYS = ("SPLIT_K",)
"""Keys that vLLM writes for other kernels of its own."""


@dataclass(frozen=True)
class TileConfig:
    """Rows, columns and depth of a tile, row blocks that sweep the columns together, warps and pipeline stages.

    The last three are AMD's: waves per SIMD to aim for (0 = the compiler's choice), the MFMA instruction's size, its
    K pack.
    """

    block_m: int
    block_n: int = 128
    block_k: int = 128
    group_m: int = 1
    num_warps: int = 4
    num_stages: int = 3
    waves_per_eu: int = 0
    matrix_instr_nonkdim: int = 0
    kpack: int = 0

    @classmethod
    def from_vllm(cls, values: Mapping[str, int], source: str) -> TileConfig:
        """One entry of a file. Raises ValueError for a key that is missing or unknown."""
        missing = [key for key in REQUIRED_KEYS if key not in values]
        unknown = sorted(set(values) - {*REQUIRED_KEYS, *AMD_KEYS, *IGNORED_KEYS})
        if missing or unknown:
            raise ValueError(f"{source}: missing keys {missing}, unknown keys {unknown}")
        # One scale per 128 columns of K: vLLM clamps its larger blocks in the same way.
        return cls(
            *(values["BLOCK_SIZE_M"], values["BLOCK_SIZE_N"], min(values["BLOCK_SIZE_K"], 128)),
            *(values["GROUP_SIZE_M"], values["num_warps"], values["num_stages"]),
            *(values.get(key, 0) for key in AMD_KEYS),
        )

    def to_vllm(self) -> dict[str, int]:
        """The entry that `from_vllm` reads."""
        shared = (self.block_m, self.block_n, self.block_k, self.group_m, self.num_warps, self.num_stages)
        amd = (self.waves_per_eu, self.matrix_instr_nonkdim, self.kpack)
        return {
            **dict(zip(REQUIRED_KEYS, shared)),
            **(dict(zip(AMD_KEYS, amd)) if self.kpack else {}),
        }


@dataclass(frozen=True)
class TunedTable:
    """What answered a look-up. configs: by number of tokens, in ascending order; slots: the E that they are for."""

    configs: dict[int, TileConfig]
    slots: int
    source: str
    reason: str

    def for_tokens(self, num_tokens: int, num_slots: int) -> TileConfig:
        """The entry nearest in rows per slot."""
        wanted = num_tokens * self.slots / num_slots
        return self.configs[min(self.configs, key=lambda tokens: abs(math.log2(tokens / max(wanted, 1e-3))))]


def file_name(num_slots: int, intermediate: int, device_name: str, quantized: bool = True) -> str:
    """vLLM's name of the file for this shape."""
    dtype = ",dtype=fp8_w8a8,block_shape=[128,128]" if quantized else ""
    return f"E={num_slots},N={intermediate},device_name={device_name}{dtype}.json"


def find_table(
    num_slots: int, intermediate: int, device: Device, quantized: bool = True, folders: tuple[Path, ...] | None = None
) -> TunedTable:
    """The tuned table for a shape: exact in the user's, our or vLLM's folder, else the nearest shape, else the rule."""
    folders = search_folders() if folders is None else folders
    return _find_table(num_slots, intermediate, device, quantized, folders)


def search_folders() -> tuple[Path, ...]:
    """Where to look, in order: the user's folder, ours, the installed vLLM's."""
    user = os.environ.get(USER_FOLDER_VARIABLE)
    vllm = find_spec("vllm")
    places = [Path(user)] if user else []
    places.append(SHIPPED)
    if vllm is not None and vllm.origin:
        places.append(Path(vllm.origin).parent / "model_executor" / "layers" / "fused_moe" / "configs")
    return tuple(places)


def load_table(path: Path, slots: int, reason: str) -> TunedTable:
    """Raises ValueError for a file that is no tuned config."""
    entries = json.loads(path.read_text())
    entries.pop("triton_version", None)
    configs = {int(tokens): TileConfig.from_vllm(values, f"{path}: {tokens}") for tokens, values in entries.items()}
    if not configs:
        raise ValueError(f"{path}: no entries")
    return TunedTable(dict(sorted(configs.items())), slots, str(path), reason)


def default_table(num_slots: int, device: Device, quantized: bool = True) -> TunedTable:
    """The rule: row blocks as large as a slot's share of the tokens, between 16 and 128."""
    tokens = [2**power for power in range(15)]
    configs = {count: default_config(count / num_slots, device, quantized) for count in tokens}
    return TunedTable(configs, num_slots, "rule", "no tuned file for this device")


def default_config(rows_per_slot: float, device: Device, quantized: bool = True) -> TileConfig:
    """The rule's choice: the smallest row block that most slots need only one of."""
    return default_tile(next((size for size in (16, 32, 64) if rows_per_slot * UNEVEN <= size), 128), device, quantized)


def default_tile(block_m: int, device: Device, quantized: bool = True) -> TileConfig:
    """The rest of a tile with row blocks of 16, 32, 64 or 128."""
    block_k = 128 if quantized else 64
    group_m = 4 if block_m >= 64 else 1
    warps = 8 if block_m == 128 or (block_m == 64 and (device.is_amd or device.is_hopper)) else 4
    if device.is_amd:
        return TileConfig(block_m, 128, block_k, group_m, warps, 2, waves_per_eu=0, matrix_instr_nonkdim=16, kpack=2)
    stages = (6 if block_m <= 32 else 4) if device.is_hopper and quantized else 3
    return TileConfig(block_m, 128, block_k, group_m, warps, stages)


@cache
def _find_table(
    num_slots: int, intermediate: int, device: Device, quantized: bool, folders: tuple[Path, ...]
) -> TunedTable:
    wanted = file_name(num_slots, intermediate, device.name, quantized)
    chips = {device.name: ""}
    if (other := SAME_CHIP.get(device.name)) is not None:
        chips[other] = f" of {other}, the same chip"
    names = {file_name(num_slots, intermediate, chip, quantized): word for chip, word in chips.items()}
    for name, word in names.items():
        for folder in folders:
            if (folder / name).is_file():
                return _logged(load_table(folder / name, num_slots, f"exact shape{word}"), wanted)
    for name, word in names.items():
        near = [(distance, path, slots) for folder in folders for distance, path, slots in _near(folder, name)]
        if near:
            _, path, slots = min(near, key=lambda found: found[0])
            return _logged(load_table(path, slots, f"nearest shape{word}: none for this one"), wanted)
    return _logged(default_table(num_slots, device, quantized), wanted)


def _near(folder: Path, name: str) -> list[tuple[float, Path, int]]:
    """Files of the same device and type, with their distance in doublings of E and N."""
    wanted = FILE_NAME.fullmatch(name)
    assert wanted is not None, name
    found = []
    for path in sorted(folder.glob("E=*.json")) if folder.is_dir() else []:
        other = FILE_NAME.fullmatch(path.name)
        if other is not None and other["device"] == wanted["device"] and other["fp8"] == wanted["fp8"]:
            ratios = (int(other[key]) / int(wanted[key]) for key in ("slots", "inter"))
            found.append((sum(abs(math.log2(ratio)) for ratio in ratios), path, int(other["slots"])))
    return found


def _logged(table: TunedTable, name: str) -> TunedTable:
    logger.info("tuned config for %s: %s (%s)", name, table.source, table.reason)
    return table


def read_provenance(path: Path) -> dict[str, Any]:
    """What lies beside a tuned file about it; empty where nothing does."""
    beside = provenance_path(path)
    return json.loads(beside.read_text()) if beside.is_file() else {}


def provenance_path(path: Path) -> Path:
    """`x.json` -> `x.provenance.json`."""
    return path.with_name(path.stem + ".provenance.json")

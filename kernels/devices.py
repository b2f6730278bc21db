"""Which accelerator this is, under the name that tuned config files carry.

NVIDIA's names are the driver's. AMD's marketing names are not to be trusted: one MI308X reports
`AMD_Instinct_MI300X_OAM`, `AMD_Instinct_MI308X_OAM` or `AMD_Radeon_Graphics` from host to host. The PCI device id
decides where it can be read, the number of compute units otherwise.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

PCI_NAMES = {
    0x74A0: "AMD_Instinct_MI300A",
    0x74A1: "AMD_Instinct_MI300X",
    0x74B5: "AMD_Instinct_MI300X",  # virtual function
    0x74A9: "AMD_Instinct_MI300X_HF",
    0x74BD: "AMD_Instinct_MI300X_HF",  # virtual function
    0x74A2: "AMD_Instinct_MI308X",
    0x74A5: "AMD_Instinct_MI325X",
    0x74B9: "AMD_Instinct_MI325X",  # virtual function
}

# 304 compute units are also an MI325X's: its driver has so far named it truly, so its name is looked at first.
CU_NAMES = {304: "AMD_Instinct_MI300X", 228: "AMD_Instinct_MI300A", 80: "AMD_Instinct_MI308X"}


@dataclass(frozen=True)
class Device:
    """name: as in tuned config files. arch: "sm_90", "gfx942", ... pci_id: the PCI device id, None where unreadable.

    shared_bytes: shared memory (LDS) that one program may use. units: multiprocessors or compute units.
    """

    name: str
    arch: str
    units: int
    shared_bytes: int
    pci_id: int | None = None

    @property
    def is_amd(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def is_hopper(self) -> bool:
        return self.arch == "sm_90"

    @property
    def has_tma(self) -> bool:
        return not self.is_amd and int(self.arch[3:]) >= 90

    @property
    def fp8_dtype(self) -> torch.dtype | None:
        """The e4m3 that its matrix units multiply; None where they multiply none."""
        if self.is_amd:
            return {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}.get(self.arch)
        return torch.float8_e4m3fn if int(self.arch[3:]) >= 89 else None


@cache
def current_device(index: int | None = None) -> Device:
    """The device that torch calls cuda:`index` (the current one by default). Raises RuntimeError where there is
    none."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    return identify(properties, pci_id=read_pci_id(properties))


def memory_bytes_per_s(properties: Any) -> float:
    """What a device's memory moves at most, from torch's device properties: the clock and the width that its driver
    names, 2 bits a pin and cycle on NVIDIA, 4 on AMD's HBM3 (MI300X: 1,300 MHz and 8,192 bits for the published 5.3
    TB/s). Where torch does not say them, an H100's."""
    clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    bits = 4 if getattr(properties, "gcnArchName", "").startswith("gfx") else 2
    return bits * clock * 1e3 * width / 8 or 3.35e12


def identify(properties: Any, pci_id: int | None = None) -> Device:
    """torch's device properties (name, multi_processor_count, gcnArchName or major and minor, ...) -> Device."""
    units = properties.multi_processor_count
    arch = getattr(properties, "gcnArchName", "").split(":")[0]
    if not arch.startswith("gfx"):
        name = properties.name.replace(" ", "_")
        # H200 NVL and H200 SXM share their files, as in vLLM.
        name = "NVIDIA_H200" if "H200" in name.split("_") else name
        shared = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
        return Device(name, f"sm_{properties.major}{properties.minor}", units, shared, pci_id)
    return Device(
        _amd_name(properties.name, units, pci_id), arch, units, (160 if arch == "gfx950" else 64) << 10, pci_id
    )


def read_pci_id(properties: Any, root: Path = Path("/sys/bus/pci/devices")) -> int | None:
    """The PCI device id of a card from sysfs; None where the driver or the container hides it."""
    try:
        address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        return int((root / address / "device").read_text(), 16)
    except (AttributeError, OSError, ValueError):
        return None


def _amd_name(reported: str, units: int, pci_id: int | None) -> str:
    name = reported.replace(" ", "_")
    if pci_id in PCI_NAMES:
        resolved, why = PCI_NAMES[pci_id], f"PCI id 0x{pci_id:04x}"
    elif "MI325" in name:
        resolved, why = "AMD_Instinct_MI325X", "its name"
    elif units in CU_NAMES:
        resolved, why = CU_NAMES[units], f"{units} compute units (no known PCI id)"
    else:
        return name
    if resolved != name:
        logger.info("device that calls itself %s is %s by %s", name, resolved, why)
    return resolved

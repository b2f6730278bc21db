"""Which tuned config file a shard's kernels would use on a device, under every name that hosts have reported for it.

The look-ups are kernels/tuning.py's and kernels/devices.py's own; vLLM's is by exact name in its folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from ep.explain.hardware import Hardware
from ep.kernels.devices import Device, identify
from ep.kernels.tuning import SHIPPED, file_name, find_table, read_provenance, search_folders


@dataclass(frozen=True)
class TunedFile:
    """reported: what the host calls the device; pci_id: None where it cannot be read.

    resolved: the name that ep looks for, file: what answers, folder: ep's, vLLM's, the user's or none for the rule.
    vllm_file: what vLLM looks for; vllm_found is None where vLLM is not installed.
    """

    reported: str
    pci_id: int | None
    resolved: str
    file: str
    folder: str
    reason: str
    how: str
    vllm_file: str
    vllm_found: bool | None


def device_of(hardware: Hardware, pci_id: int | None = None, reported: str | None = None) -> Device:
    """The device as the kernels see it."""
    properties = SimpleNamespace(
        name=(reported or hardware.tuned_name).replace("_", " "),
        multi_processor_count=hardware.units,
        gcnArchName=hardware.arch if hardware.is_amd else "",
        major=0 if hardware.is_amd else int(hardware.arch.removeprefix("sm_")) // 10,
        minor=0 if hardware.is_amd else int(hardware.arch.removeprefix("sm_")) % 10,
        shared_memory_per_block_optin=hardware.shared_bytes,
    )
    return identify(properties, pci_id)


def tuned_files(
    hardware: Hardware,
    num_slots: int,
    intermediate: int,
    quantized: bool,
    folders: tuple[Path, ...] | None = None,
    vllm_folder: Path | None = None,
) -> tuple[TunedFile, ...]:
    """A row for every name, with each PCI id and, for AMD's, without: there the compute units decide."""
    folders = search_folders() if folders is None else folders
    vllm_folder = _vllm_folder() if vllm_folder is None else vllm_folder
    ids = (*hardware.pci_ids, None) if hardware.is_amd else hardware.pci_ids
    rows = []
    for reported in hardware.reported_names:
        for pci_id in ids:
            device = device_of(hardware, pci_id, reported)
            table = find_table(num_slots, intermediate, device, quantized, folders)
            # vLLM resolves an AMD device by its PCI id as well, and takes the reported name where it knows none.
            theirs = device.name if pci_id is not None else reported
            vllm_file = file_name(num_slots, intermediate, theirs, quantized)
            found = None if vllm_folder is None else (vllm_folder / vllm_file).is_file()
            path = Path(table.source)
            rule = table.source == "rule"
            rows.append(
                TunedFile(
                    reported=reported,
                    pci_id=pci_id,
                    resolved=device.name,
                    file="rule" if rule else path.name,
                    folder="" if rule else _whose(path, folders),
                    reason=table.reason,
                    how="" if rule else _measured(path),
                    vllm_file=vllm_file,
                    vllm_found=found,
                )
            )
    return tuple(rows)


def _whose(path: Path, folders: tuple[Path, ...]) -> str:
    if path.parent == SHIPPED:
        return "ep"
    return "vLLM" if path.parent == folders[-1] and path.parent.parts[-2:] == ("fused_moe", "configs") else "user"


def _measured(path: Path) -> str:
    """Whether the file's provenance says that it was measured; "" where nothing is said."""
    how = str(read_provenance(path).get("how", ""))
    return "" if not how else ("measured" if how.startswith("measured") else "not measured")


def _vllm_folder() -> Path | None:
    vllm = find_spec("vllm")
    if vllm is None or not vllm.origin:
        return None
    return Path(vllm.origin).parent / "model_executor" / "layers" / "fused_moe" / "configs"

"""The devices that can be explained: configs/devices/*.toml."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ep.config_keys import ConfigKeys
from ep.errors import OptionError
from ep.explain.figure import KINDS, Figure

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FIGURES = ("memory_bytes", "read_bytes_per_s", "fp8_flops", "bf16_flops")
LINKS = ("same_node", "between_nodes")
PLAIN = ("name", "tuned_name", "arch", "units", "shared_bytes", "gpus_per_node", "pci_ids", "reported_names")
LINK_SIZES = ("num_tokens", "hidden_size", "top_k", "shards", "nodes")


@dataclass(frozen=True)
class KnownRoundTrip:
    """A round trip without compute that somebody timed, and the bandwidth that other sizes are scaled by.

    num_tokens with top_k choices each over so many shards on so many nodes; rows of dispatch_dtype out, bf16 back.
    """

    us: Figure
    bytes_per_s: Figure
    num_tokens: int
    hidden_size: int
    top_k: int
    shards: int
    nodes: int
    dispatch_dtype: str


@dataclass(frozen=True)
class Hardware:
    """key: what --device calls it. tuned_name: as in tuned config files. reported_names: what hosts have called it.

    read_bytes_per_s and the FLOP/s are what kernels reach, not the data sheet's peaks.
    """

    key: str
    name: str
    tuned_name: str
    arch: str
    units: int
    shared_bytes: int
    gpus_per_node: int
    pci_ids: tuple[int, ...]
    reported_names: tuple[str, ...]
    memory_bytes: Figure
    read_bytes_per_s: Figure
    fp8_flops: Figure
    bf16_flops: Figure
    same_node: KnownRoundTrip
    between_nodes: KnownRoundTrip

    @property
    def is_amd(self) -> bool:
        return self.arch.startswith("gfx")


def list_hardware() -> list[str]:
    """Keys of the known devices, sorted."""
    files = (resources.files("ep") / "configs" / "devices").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load_hardware(key: str) -> Hardware:
    """Raises OptionError for a device that is not known."""
    known = list_hardware()
    if key not in known:
        raise OptionError(f"--device {key}: expected one of {', '.join(known)}")
    file = resources.files("ep") / "configs" / "devices" / f"{key}.toml"
    return parse_hardware(key, file.read_text(encoding="utf-8"), str(file))


def hardware_of(tuned_name: str) -> str | None:
    """The key of a device by its name in tuned config files; None where it is not known."""
    return next((key for key in list_hardware() if load_hardware(key).tuned_name == tuned_name), None)


def parse_hardware(key: str, text: str, source: str) -> Hardware:
    """The device that a TOML text describes; `source` names it in errors. Raises ModelError, as every file reader."""
    keys = ConfigKeys(tomllib.loads(text), source)
    keys.only(*PLAIN, *FIGURES, *LINKS)
    return Hardware(
        key=key,
        name=keys.get("name", str),
        tuned_name=keys.get("tuned_name", str),
        arch=keys.get("arch", str),
        units=keys.size("units"),
        shared_bytes=keys.size("shared_bytes"),
        gpus_per_node=keys.size("gpus_per_node"),
        pci_ids=tuple(keys.get("pci_ids", list)),
        reported_names=tuple(keys.get("reported_names", list)),
        same_node=_known_round_trip(keys, "same_node"),
        between_nodes=_known_round_trip(keys, "between_nodes"),
        **{name: _figure(keys, name) for name in FIGURES},
    )


def _figure(keys: ConfigKeys, name: str) -> Figure:
    table = ConfigKeys(keys.get(name, dict), f"{keys.source}: [{name}]")
    table.only("value", "kind", "source")
    kind: Any = table.get("kind", str)
    if kind not in KINDS:
        table.expect("kind", " or ".join(KINDS), None)
    return Figure(table.get("value", float), kind, table.get("source", str))


def _known_round_trip(keys: ConfigKeys, name: str) -> KnownRoundTrip:
    table = ConfigKeys(keys.get(name, dict), f"{keys.source}: [{name}]")
    table.only("us", "bytes_per_s", "dispatch_dtype", *LINK_SIZES)
    return KnownRoundTrip(
        us=_figure(table, "us"),
        bytes_per_s=_figure(table, "bytes_per_s"),
        dispatch_dtype=table.get("dispatch_dtype", str),
        **{size: table.size(size) for size in LINK_SIZES},
    )

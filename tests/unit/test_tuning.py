"""Tuned files: vLLM's names and keys, the order of search, and devices that lie about their names."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ep import tune
from ep.kernels.devices import Device, identify, memory_bytes_per_s, read_pci_id
from ep.kernels.fused_moe import ExpertShape, choose_config
from ep.kernels.gemm_plan import plan_gemm
from ep.kernels.tuning import (
    SHIPPED,
    TileConfig,
    default_config,
    file_name,
    find_table,
    load_table,
    provenance_path,
    read_provenance,
    search_folders,
)

H200 = Device("NVIDIA_H200", "sm_90", units=132, shared_bytes=227 << 10, pci_id=0x2335)
MI300X = Device("AMD_Instinct_MI300X", "gfx942", units=304, shared_bytes=64 << 10, pci_id=0x74A1)
NAMES = ("AMD_Instinct_MI300X_OAM", "AMD_Instinct_MI308X_OAM", "AMD Radeon Graphics", "AMD Instinct MI300X")


@dataclass(frozen=True)
class Properties:
    """What torch tells of a device."""

    name: str
    multi_processor_count: int
    gcnArchName: str = "gfx942:sramecc+:xnack-"
    pci_domain_id: int = 0
    pci_bus_id: int = 0x75
    pci_device_id: int = 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("pci_id", "units", "resolved"),
    [
        (0x74A1, 304, "AMD_Instinct_MI300X"),
        (0x74B5, 304, "AMD_Instinct_MI300X"),
        (0x74A2, 80, "AMD_Instinct_MI308X"),
        (0x74A5, 304, "AMD_Instinct_MI325X"),
        (0x74A0, 228, "AMD_Instinct_MI300A"),
        (None, 304, "AMD_Instinct_MI300X"),
        (None, 80, "AMD_Instinct_MI308X"),
    ],
)
def test_amd_devices_go_by_pci_id_then_by_compute_units(
    name: str, pci_id: int | None, units: int, resolved: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="ep.kernels.devices"):
        device = identify(Properties(name, units), pci_id)
    assert (device.name, device.arch, device.shared_bytes) == (resolved, "gfx942", 65_536)
    assert device.fp8_dtype == torch.float8_e4m3fnuz
    if name.replace(" ", "_") != resolved:
        why = f"PCI id 0x{pci_id:04x}" if pci_id else f"{units} compute units"
        assert f"calls itself {name.replace(' ', '_')} is {resolved} by {why}" in caplog.text


def test_an_mi325x_without_pci_id_keeps_its_name() -> None:
    assert identify(Properties("AMD Instinct MI325X", 304)).name == "AMD_Instinct_MI325X"


@pytest.mark.parametrize(
    ("device", "published"),
    [
        ({"memory_clock_rate": 3_201_000, "memory_bus_width": 6144}, 4.8e12),  # H200
        ({"memory_clock_rate": 2_619_000, "memory_bus_width": 5120}, 3.35e12),  # H100 SXM
        ({"memory_clock_rate": 1_300_000, "memory_bus_width": 8192, "gcnArchName": "gfx942:sramecc+"}, 5.3e12),
        ({}, 3.35e12),
    ],
)
def test_memory_speeds_are_about_the_published_ones(device: dict[str, object], published: float) -> None:
    assert memory_bytes_per_s(SimpleNamespace(**device)) == pytest.approx(published, rel=0.03)


def test_pci_id_is_read_from_sysfs(tmp_path: Path) -> None:
    properties = Properties("AMD Radeon Graphics", 80)
    assert read_pci_id(properties, tmp_path) is None
    (tmp_path / "0000:75:00.0").mkdir()
    (tmp_path / "0000:75:00.0" / "device").write_text("0x74a2\n")
    assert read_pci_id(properties, tmp_path) == 0x74A2


tiles = st.builds(
    TileConfig,
    block_m=st.sampled_from([16, 32, 64, 128]),
    block_n=st.sampled_from([64, 128]),
    block_k=st.sampled_from([64, 128]),
    group_m=st.integers(1, 64),
    num_warps=st.sampled_from([4, 8]),
    num_stages=st.integers(1, 6),
)


@given(tile=tiles, amd=st.booleans())
def test_an_entry_reads_back(tile: TileConfig, amd: bool) -> None:
    tile = replace(tile, kpack=2, matrix_instr_nonkdim=16) if amd else tile
    assert TileConfig.from_vllm(tile.to_vllm(), "test") == tile


@pytest.mark.parametrize(
    ("change", "reason"), [({"NUM_WARPS": 4}, r"unknown keys \['NUM_WARPS'\]"), ({"num_warps": None}, "missing keys")]
)
def test_a_wrong_entry_is_refused_with_its_place(change: dict[str, int | None], reason: str, tmp_path: Path) -> None:
    entry = {key: value for key, value in (TileConfig(16).to_vllm() | change).items() if value is not None}
    path = tmp_path / file_name(8, 2048, "X")
    path.write_text(json.dumps({"triton_version": "3.6.0", "64": entry}))
    with pytest.raises(ValueError, match=f"64: .*{reason}"):
        load_table(path, 8, "test")


def write(
    folder: Path, slots: int, inter: int, tile: TileConfig, device: str = "NVIDIA_H200", tokens: int = 64
) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / file_name(slots, inter, device)
    path.write_text(json.dumps({str(tokens): tile.to_vllm()}))
    return path


def test_search_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Exact in the first folder that has it; else the nearest shape; else the rule. One log line says which and why."""
    user, ours = tmp_path / "user", tmp_path / "ours"
    folders = (user, ours)
    write(ours, 32, 2048, TileConfig(32))
    write(ours, 256, 2048, TileConfig(64))
    write(ours, 16, 2048, TileConfig(16), device="AMD_Instinct_MI300X")
    with caplog.at_level(logging.INFO, logger="ep.kernels.tuning"):
        found = find_table(32, 2048, H200, folders=folders)
        assert (found.reason, found.configs[64].block_m) == ("exact shape", 32)
        near = find_table(18, 2048, H200, folders=folders)
        assert (near.slots, near.configs[64].block_m) == (32, 32)
        write(user, 18, 2048, TileConfig(128))
        assert find_table(18, 2048, H200, folders=(user, ours, tmp_path)).configs[64].block_m == 128
        assert find_table(18, 2048, replace(H200, name="NVIDIA_H20"), folders=folders).source == "rule"
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert "E=18,N=2048,device_name=NVIDIA_H200" in lines[1] and "(nearest shape" in lines[1] and "E=32" in lines[1]


def test_the_users_folder_comes_first_and_vllms_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    folders = search_folders()
    assert folders[:2] == (tmp_path, SHIPPED)
    assert all(folder.parts[-3:] == ("layers", "fused_moe", "configs") for folder in folders[2:])


def test_vllms_own_files_are_read_where_it_is_installed(caplog: pytest.LogCaptureFixture) -> None:
    folders = search_folders()[-1:]
    if folders[0] == SHIPPED:
        pytest.skip("no vLLM here")
    table = find_table(32, 2048, H200, folders=folders)
    assert table.reason == "exact shape"
    assert all(tile.block_k <= 128 for tile in table.configs.values())


@given(
    tokens=st.sampled_from([64, 1024]), slots=st.sampled_from([8, 32, 36]), shape_slots=st.sampled_from([8, 32, 128])
)
def test_another_shapes_entry_is_chosen_by_rows_per_slot(tokens: int, slots: int, shape_slots: int) -> None:
    from ep.kernels.tuning import TunedTable

    table = TunedTable({count: TileConfig(16, group_m=count) for count in (1, 8, 64, 512, 4096)}, shape_slots, "x", "y")
    chosen = table.for_tokens(tokens, slots).group_m
    distances = {
        count: max(count / shape_slots, tokens / slots) / min(count / shape_slots, tokens / slots)
        for count in table.configs
    }
    assert distances[chosen] == pytest.approx(min(distances.values()))


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("E=*block_shape=?128,128?.json")), ids=lambda path: path.name)
def test_shipped_files_are_whole_and_say_where_they_come_from(path: Path) -> None:
    slots = int(path.name[2:].split(",")[0])
    table = load_table(path, slots, "test")
    assert {1, 128, 1024, 4096, 16384} <= set(table.configs)
    provenance = read_provenance(path)
    assert provenance["device"] in path.name
    assert {"triton"} <= set(provenance["versions"])
    if provenance["how"].startswith("measured"):
        measured = provenance["measured_us"]
        assert set(measured) == {str(tokens) for tokens in table.configs}
        assert all(entry["best"] <= entry["default"] for entry in measured.values())
        assert provenance["date"] and {"torch", "ep"} <= set(provenance["versions"])
    else:
        assert provenance["how"].startswith("not measured: chosen by rule")


def test_h200_and_mi300x_have_files_for_all_splits() -> None:
    for device in (H200.name, MI300X.name, "AMD_Instinct_MI308X"):
        for slots in (4, 8, 9, 16, 18, 32, 33, 36, 64, 128, 256):
            assert (SHIPPED / file_name(slots, 2048, device)).is_file()


def test_the_tile_for_a_call_comes_from_the_shipped_file() -> None:
    shape = ExpertShape(58, 32, 7168, 2048, torch.float8_e4m3fn)
    table = load_table(SHIPPED / file_name(32, 2048, H200.name), 32, "test")
    assert choose_config(shape, 128, H200) == table.configs[128]


@given(tile=tiles, swiglu=st.booleans(), wide=st.booleans())
def test_a_plan_fits_the_device(tile: TileConfig, swiglu: bool, wide: bool) -> None:
    """Any file's tile, also one of vLLM's, becomes a launch whose stages fit into shared memory."""
    k, columns = (7168, 2048) if swiglu else (2048, 7168)
    plan = plan_gemm(tile, H200, k, columns, 2 if wide else 1, swiglu=swiglu, quantized=not wide)
    weight_tiles = 2 if swiglu or plan.hopper else 1
    stage = plan.stage_steps * (weight_tiles * plan.block_n + plan.block_m) * plan.block_k * (2 if wide else 1)
    assert plan.stages * stage <= H200.shared_bytes
    assert plan.hopper == (not wide)


SHAPE = ExpertShape(1, 8, 7168, 2048, torch.float8_e4m3fn)


def result(tokens: int, us: float, block_m: int = 16) -> tune.Measured:
    return tune.Measured(8, tokens, TileConfig(block_m), us, us * 1.5, 3)


def test_a_better_measured_entry_is_not_overwritten(tmp_path: Path) -> None:
    tune.write_file(tmp_path, SHAPE, H200, [result(1, 50.0), result(64, 90.0)])
    kept = tune.write_file(tmp_path, SHAPE, H200, [result(1, 60.0, 32), result(64, 80.0, 32), result(128, 99.0)])
    path = tmp_path / file_name(8, 2048, H200.name)
    configs = load_table(path, 8, "test").configs
    assert kept == {1}
    assert {tokens: tile.block_m for tokens, tile in configs.items()} == {1: 16, 64: 32, 128: 16}
    assert read_provenance(path)["measured_us"]["64"] == {"best": 80.0, "default": 120.0}
    assert read_provenance(path)["pci_id"] == "0x2335"


def test_a_cut_journal_loses_one_result(tmp_path: Path) -> None:
    journal = tmp_path / "tune.jsonl"
    results = [result(1, 50.0), result(64, 90.0)]
    tune.append_journal(journal, results[0])
    tune.append_journal(journal, results[1])
    assert tune.read_journal(journal) == results
    text = journal.read_text()
    journal.write_text(text[:-20])
    assert tune.read_journal(journal) == results[:1]
    tune.append_journal(journal, results[1])
    assert tune.read_journal(journal) == results


@given(rows=st.floats(0.01, 2000), amd=st.booleans())
def test_candidates_hold_the_rule_and_never_repeat(rows: float, amd: bool) -> None:
    device = MI300X if amd else H200
    found = tune.candidates(rows, device, quantized=True)
    assert len(set(found)) == len(found)
    assert default_config(rows, device).block_m in {tile.block_m for tile in found}


def test_provenance_lies_beside_its_file() -> None:
    assert provenance_path(Path("a/E=8,N=1.json")) == Path("a/E=8,N=1.provenance.json")

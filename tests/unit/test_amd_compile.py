"""Every shipped MI300X and MI308X tile compiles for gfx942 without a GPU: FP8 in the matrix units, no spills, LDS
that fits."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.programs import printed_by

LDS_LIMIT = 65_536


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return printed_by("compile_amd.py")


def test_both_devices_have_all_their_files(report: dict[str, Any]) -> None:
    names = [entry["file"] for entry in report["files"]]
    for device in ("AMD_Instinct_MI300X", "AMD_Instinct_MI308X"):
        slots = {int(name[2:].split(",")[0]) for name in names if f"device_name={device}," in name}
        assert slots >= {4, 8, 9, 16, 18, 32, 33, 36, 64, 128, 256}


def test_no_shipped_tile_is_rejected(report: dict[str, Any]) -> None:
    assert {entry["file"]: entry["problems"] for entry in report["files"] if entry["problems"]} == {}


def test_resources(report: dict[str, Any]) -> None:
    print()
    for tile in report["tiles"]:
        for name, used in zip(("gate_up", "down"), tile["gemms"]):
            print(f"{tile['tile']} {name}: {used}")
            assert used["fp8_mfma"] > 0
            assert used["other_mfma"] == 0
            assert used["lds"] <= LDS_LIMIT
            assert used["spills"] == 0

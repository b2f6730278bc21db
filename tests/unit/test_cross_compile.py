"""Every kernel beside the grouped GEMMs compiles for GPUs that are not here: gfx942 and, as a check of it, sm_90.
Nothing spills, the LDS suffices; between GPUs rows travel in pieces of 8 or 16 bytes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.programs import printed_by

KERNELS = {
    "dispatch_kernel", "wait_kernel", "combine_kernel", "wait_and_combine_kernel", "take_kernel", "collect_kernel",
    "return_kernel", "begin_kernel",
}  # fmt: skip
OPS = {
    "_route_kernel", "_quantize_tokens_kernel", "_count_kernel", "_start_kernel", "_permute_kernel",
    "sum_choices_kernel", "_assign_kernel",
}  # fmt: skip
MOVERS = KERNELS - {"begin_kernel", "wait_kernel", "take_kernel"}
PUBLISHES = {"dispatch_kernel": 1, "return_kernel": 2, "wait_kernel": 3, "wait_and_combine_kernel": 3}
"""Releases at system scope: a row's flag, and what hosts are told."""
WIDE = {"gfx942": ("dwordx4", "dwordx2"), "sm_90": ("v4.b32",)}


@pytest.fixture(scope="module", params=WIDE)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def compiled(arch: str) -> list[dict[str, Any]]:
    return printed_by("compile_p2p.py", arch)


def test_all_of_the_data_plane_compiles(compiled: list[dict[str, Any]]) -> None:
    assert {kernel["kernel"] for kernel in compiled} == KERNELS


def test_resources(arch: str, compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        assert kernel["lds"] <= 65_536
        assert kernel.get("spills", 0) == 0, kernel
        if kernel["kernel"] in MOVERS:
            assert any(one.startswith(WIDE[arch]) for one in kernel["stores"]), kernel
            assert any(one.startswith((*WIDE[arch], "cv.v4")) for one in kernel["loads"]), kernel
        assert kernel["publishes"] >= PUBLISHES.get(kernel["kernel"], 0), kernel


def test_the_ops_beside_the_products_compile(arch: str) -> None:
    compiled = printed_by("compile_ops.py", arch)
    assert {kernel["kernel"] for kernel in compiled} == OPS
    for kernel in compiled:
        assert kernel["lds"] <= 65_536 and kernel.get("spills", 0) == 0, kernel

"""Every kernel of the data plane between GPUs compiles for GPUs that are not here: gfx942 and, as a check of the check,
sm_90. Rows travel in pieces of 8 or 16 bytes, nothing spills, the LDS suffices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KERNELS = {
    "dispatch_kernel", "wait_kernel", "combine_kernel", "wait_and_combine_kernel", "take_kernel", "collect_kernel",
    "return_kernel",
}  # fmt: skip
MOVERS = KERNELS - {"wait_kernel", "take_kernel"}
PUBLISHES = {"dispatch_kernel": 1, "return_kernel": 2, "wait_kernel": 3, "wait_and_combine_kernel": 3}
"""Releases at system scope: a row's flag, and what hosts are told."""
WIDE = {"gfx942": ("dwordx4", "dwordx2"), "sm_90": ("v4.b32",)}


@pytest.fixture(scope="module", params=WIDE)
def compiled(request: pytest.FixtureRequest) -> tuple[str, list[dict[str, Any]]]:
    program = Path(__file__).with_name("compile_p2p.py")
    root = program.parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), request.param],
        capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return request.param, json.loads(done.stdout)


def test_all_of_them_compile(compiled: tuple[str, list[dict[str, Any]]]) -> None:
    assert {kernel["kernel"] for kernel in compiled[1]} == KERNELS


def test_resources(compiled: tuple[str, list[dict[str, Any]]]) -> None:
    arch, kernels = compiled
    for kernel in kernels:
        assert kernel["lds"] <= 65_536
        assert kernel.get("spills", 0) == 0, kernel
        if kernel["kernel"] in MOVERS:
            assert any(one.startswith(WIDE[arch]) for one in kernel["stores"]), kernel
            assert any(one.startswith((*WIDE[arch], "cv.v4")) for one in kernel["loads"]), kernel
        assert kernel["publishes"] >= PUBLISHES.get(kernel["kernel"], 0), kernel

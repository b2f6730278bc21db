"""Settings for all tests: nothing leaves this machine, and what needs a GPU is skipped where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Before anything imports the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

settings.register_profile("ep", deadline=None, derandomize=bool(os.environ.get("CI")), max_examples=50)
settings.load_profile("ep")

TESTS = Path(__file__).parent
BESIDE = {
    "test_bad_input.py", "test_bench_client.py", "test_explain.py", "test_gating.py", "test_graphs.py",
    "test_phases.py", "test_scheduler.py", "test_task_pool.py",
}  # fmt: skip
"""In tests/serving: what starts no server of its own, or one that ends before it serves."""


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def needs_the_machine(path: str) -> bool:
    """Whether what is tested there starts servers, or runs on a GPU: one such test after the other."""
    return Path(path).parent.name != "unit" and Path(path).name not in BESIDE


class OneServerAtATime(LoadScopeScheduling):
    """One worker has all that needs the machine, from the start; every other test goes to a worker that is free."""

    def _split_scope(self, nodeid: str) -> str:
        return "servers" if needs_the_machine(nodeid.split("::")[0]) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return OneServerAtATime(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What runs beside servers gives way to them: their threads wait for each other without giving up their cores."""
    if "PYTEST_XDIST_WORKER" in os.environ and not needs_the_machine(str(item.path)):
        os.nice(19)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder == "serving":
            item.add_marker("serving")
        elif folder == "gpu":
            item.add_marker("gpu")
            if not has_gpu():
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))

"""Settings for all tests: nothing leaves this machine, and what needs a GPU is skipped where there is none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before anything imports the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

settings.register_profile("ep", deadline=None, derandomize=bool(os.environ.get("CI")), max_examples=50)
settings.load_profile("ep")

TESTS = Path(__file__).parent


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.one_server import OneServerAtATime

    return OneServerAtATime(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        from tests.one_server import gives_way

        if gives_way(str(item.path)):
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

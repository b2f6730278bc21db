"""How pytest-xdist deals the tests out: those that need the whole machine one after the other, others beside them."""

from __future__ import annotations

from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

BESIDE = {
    "test_bad_input.py", "test_bench_client.py", "test_explain.py", "test_gating.py", "test_graphs.py",
    "test_phases.py", "test_scheduler.py", "test_task_pool.py",
}  # fmt: skip
"""In tests/serving: what starts no server of its own, or one that ends before it serves."""


def needs_the_machine(path: str) -> bool:
    """Whether what is tested there starts servers, or runs on a GPU."""
    return Path(path).parent.name != "unit" and Path(path).name not in BESIDE


class OneServerAtATime(LoadScopeScheduling):
    """One worker has all that needs the machine, from the start; every other test goes to a worker that is free."""

    def _split_scope(self, nodeid: str) -> str:
        return "servers" if needs_the_machine(nodeid.split("::")[0]) else nodeid

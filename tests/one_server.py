"""How pytest-xdist deals the tests out: those that need the whole machine one after the other, others beside them."""

from __future__ import annotations

from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

BESIDE = (
    "test_bad_input", "test_bench_client", "test_explain", "test_gating", "test_graphs", "test_phases",
    "test_scheduler", "test_task_pool",
)  # fmt: skip
"""In tests/serving: modules that start no server of their own, or one that ends before it serves."""
TIMED = (
    "test_bench_server", "test_graph_router", "test_group_router", "test_handover", "test_hosts", "test_ipc",
    "test_mailbox", "test_memory", "test_metrics", "test_mover", "test_recorder", "test_router", "test_shard",
    "test_tcp", "test_trace_log", "test_transport",
)  # fmt: skip
"""In tests/unit: how the names of modules begin that look at the clock, or whose processes wait for each other. They
come before all that gives way to servers."""


def needs_the_machine(path: str) -> bool:
    """Whether what is tested there starts servers, or runs on a GPU."""
    return Path(path).parent.name != "unit" and not Path(path).name.startswith(BESIDE)


def gives_way(path: str) -> bool:
    """Whether what is tested there may be as slow as servers beside it make it: their threads wait for each other
    without giving up their cores."""
    return not needs_the_machine(path) and not Path(path).name.startswith(TIMED)


class OneServerAtATime(LoadScopeScheduling):
    """One worker has all that needs the machine, from the start; every other test goes to a worker that is free, those
    of larger scopes first."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::")[0]
        return "servers" if needs_the_machine(path) else nodeid if gives_way(path) else path

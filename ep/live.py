"""The load trace of a running instance, as far as it has got."""

from __future__ import annotations

from ep.instances import choose, coordinators
from ep.link import NAMESPACE
from ep.trace import Trace, parse_trace
from ep.trace_parts import merge_parts, part_path

_TIMEOUT_S = 60.0


def collect_live(address: str, instance: str | None = None) -> Trace:
    """Asks all routers of the instance. Raises OptionError where nothing runs or records, TraceError."""
    import ray

    with coordinators(address) as instances:
        name, coordinator = choose(instances, instance)
        num_routers = ray.get(coordinator.status.remote(), timeout=_TIMEOUT_S)["num_routers"]
        routers = [ray.get_actor(f"{name}/router-{rank}", namespace=NAMESPACE) for rank in range(num_routers)]
        parts = ray.get([router.trace_bytes.remote() for router in routers], timeout=_TIMEOUT_S)
    return merge_parts([parse_trace(data, part_path(name, rank)) for rank, data in enumerate(parts)])

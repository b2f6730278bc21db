"""The load trace of a running instance, as far as it has got."""

from __future__ import annotations

from ep.instances import choose, coordinators
from ep.link import NAMESPACE
from ep.trace import Trace, parse_trace

_TIMEOUT_S = 60.0


def collect_live(address: str, instance: str | None = None) -> Trace:
    """Asks the instance's first router. Raises OptionError where nothing runs or records, TraceError."""
    import ray

    with coordinators(address) as instances:
        name, _ = choose(instances, instance)
        router = ray.get_actor(f"{name}/router-0", namespace=NAMESPACE)
        data = ray.get(router.trace_bytes.remote(), timeout=_TIMEOUT_S)
    return parse_trace(data, name)

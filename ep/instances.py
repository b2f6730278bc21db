"""The running instances of a Ray cluster, for commands that look at them or steer them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from ep.errors import OptionError
from ep.link import NAMESPACE

_SUFFIX = "/coordinator"


@contextmanager
def coordinators(address: str) -> Iterator[dict[str, Any]]:
    """The coordinator's handle of every instance on the cluster at `address` ("auto": this machine's), by name. Inside,
    stdout is stderr: Ray prints there what it thinks of lost nodes, which is no part of a JSON document.

    Raises OptionError where there is no such cluster.
    """
    import ray

    from ep.cluster.session import join_or_start, runs_here

    if address == "auto" and not runs_here():
        raise OptionError("--address auto: no Ray cluster runs on this machine")
    with redirect_stdout(sys.stderr):
        join_or_start(address, num_cpus=0)
        try:
            actors = ray.util.list_named_actors(all_namespaces=True)
            names = sorted(a["name"] for a in actors if a["namespace"] == NAMESPACE and a["name"].endswith(_SUFFIX))
            yield {name.removesuffix(_SUFFIX): ray.get_actor(name, namespace=NAMESPACE) for name in names}
        finally:
            ray.shutdown()


def choose(instances: dict[str, Any], name: str | None) -> tuple[str, Any]:
    """The instance that is meant: the only one, or the one named. Raises OptionError."""
    if name is None and len(instances) == 1:
        return next(iter(instances.items()))
    running = ", ".join(instances) or "none"
    if name is None:
        raise OptionError(f"{len(instances)} instances run on this cluster ({running}), expected --instance NAME")
    if name not in instances:
        raise OptionError(f"--instance {name}: expected one of those that run on this cluster: {running}")
    return name, instances[name]

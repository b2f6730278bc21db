"""The hosts of a Ray cluster: what is free on them, and whether they still answer.

Ray itself takes a minute, as it comes, to call a host dead that is cut off.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import state
from ray.exceptions import RayError

from ep.cluster.host_lines import HostLines, Port
from ep.cluster.spread import Host

log = logging.getLogger(__name__)
PERIOD_S, TIMEOUT_S = 1.0, 1.5
LOST_S = 3.5
"""A host that has not been heard of for that long, and takes no connection, is lost: within 5 s."""


def live_hosts(first: str | None = None) -> list[Host]:
    """Nodes that Ray counts as alive, by address, the node with id `first` before the others."""
    free = state.available_resources_per_node()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    nodes.sort(key=lambda node: (node["NodeID"] != first, _numbers(node["NodeManagerAddress"])))
    return [Host(node["NodeManagerAddress"], node["NodeID"], free.get(node["NodeID"], {})) for node in nodes]


@dataclass
class _Watched:
    """since: when the host was last heard of. lost: why it is lost, "" while it is not; lost_at: when that was said."""

    since: float
    lost: str = ""
    lost_at: float = 0.0


class HostWatch:
    """Looks every second whether the Ray nodes at these addresses are there.

    on_lost is told, from a thread of the watch, when one is lost; it must return soon. A host comes back when it
    answers and Ray counts it as alive.
    """

    def __init__(self, addresses: Collection[str], on_lost: Callable[[str], None]) -> None:
        self._hosts = {address: _Watched(time.time()) for address in addresses}
        self._on_lost = on_lost
        self._lines = HostLines()

    def watch(self, address: str) -> None:
        """This host from now on too."""
        self._hosts.setdefault(address, _Watched(time.time()))

    def start(self) -> None:
        if self._hosts:
            threading.Thread(target=self._run, daemon=True, name="hosts").start()

    def lost(self, address: str) -> str:
        """Why this host is lost, "" where it is not or is not watched."""
        host = self._hosts.get(address)
        return host.lost if host is not None else ""

    def status(self) -> list[dict[str, Any]]:
        """For `ep status`. silent_s: since when a lost host has not answered; lost_after_s: when that was seen."""
        return [
            {
                "address": address,
                "state": "lost" if host.lost else "up",
                "why": host.lost,
                "silent_s": round(time.time() - host.since, 1) if host.lost else 0.0,
                "lost_after_s": round(host.lost_at - host.since, 1) if host.lost else 0.0,
            }
            for address, host in dict(self._hosts).items()
        ]

    def _run(self) -> None:
        while True:
            time.sleep(PERIOD_S)
            try:
                ports = {n["NodeManagerAddress"]: n["NodeManagerPort"] for n in ray.nodes() if n["Alive"]}
                hosts = dict(self._hosts)
                self._look(hosts, ports, self._lines.silent([(a, ports[a]) for a in hosts if a in ports], TIMEOUT_S))
            except (RayError, OSError) as error:  # the head's own trouble, or no descriptor left: look again
                log.warning("hosts cannot be watched: %s", error)

    def _look(self, hosts: Mapping[str, _Watched], ports: Mapping[str, int], silent: Mapping[Port, str]) -> None:
        for address, host in hosts.items():
            port = ports.get(address)
            why = "Ray counts it as dead" if port is None else silent.get((address, port), "")
            if port is not None:
                host.since = max(host.since, self._lines.heard.get((address, port), 0.0))
            if not why:
                host.lost = ""
            elif not host.lost and (port is None or time.time() - host.since >= LOST_S):
                host.lost, host.lost_at = why, time.time()
                log.warning("host %s is lost: %s", address, why)
                self._on_lost(address)


def _numbers(address: str) -> tuple[Any, ...]:
    """198.18.0.9 before 198.18.0.10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in address.split("."))

"""`ep serve` on a cluster of several hosts, from one of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep.bench.hosts.cluster import HostCluster
from ep.bench.server import EP_COMMAND, Server, free_port
from ep.errors import EpError

_EP = EP_COMMAND[:-1]
_STATUS_S = 60.0


@dataclass(frozen=True)
class Spread:
    """num_shards on num_nodes nodes of the cluster."""

    num_shards: int
    num_nodes: int


def start_server(
    cluster: HostCluster,
    model: str,
    checkpoint: Path,
    spread: Spread,
    trace: Path,
    logs: Path,
    flags: Sequence[str] = (),
) -> Server:
    """Starts it on the cluster's first host and returns at once. flags: further options of `ep serve`."""
    host = cluster.addresses[0]
    port = free_port() if cluster.kind == "namespaces" else free_port(host)
    command = [*EP_COMMAND, model, "--checkpoint", str(checkpoint), "--address", cluster.ray_address]
    command += ["--shards", str(spread.num_shards), "--nodes", str(spread.num_nodes), "--trace", str(trace)]
    command += ["--host", host, "--port", str(port), "--no-auto-rebalance", *flags]
    name = f"ep-{spread.num_nodes}"
    url = f"http://{host}:{port}"
    return Server(name, cluster.command(*command), url, logs / f"{name}.log", cluster.environment)


def cluster_status(cluster: HostCluster) -> list[dict[str, Any]]:
    """What `ep status --json` says. Raises EpError where it fails."""
    done = subprocess.run(
        cluster.command(*_EP, "status", "--json", "--address", cluster.ray_address),
        env=cluster.full_environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=_STATUS_S,
        check=False,
    )
    if done.returncode != 0:
        raise EpError(f"ep status: {done.stderr.strip().splitlines()[-1:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def lost_hosts(cluster: HostCluster) -> list[str]:
    """One sentence for each host that is lost, with the shards that are out with it."""
    sentences = []
    for instance in cluster_status(cluster):
        for host in instance["hosts"]:
            if host["state"] == "lost":
                out = [str(s["shard_idx"]) for s in instance["shards"] if s["host"] == host["address"]]
                what = f"shards {', '.join(out)} with it" if out else "its shards run elsewhere now"
                sentences.append(f"host {host['address']} was lost ({host['why']}), {what}")
    return sentences

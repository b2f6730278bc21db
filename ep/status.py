"""`ep status`: what runs on a Ray cluster, as the coordinators and routers tell it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ep.errors import ClusterError
from ep.instances import coordinators
from ep.link import NAMESPACE

_TIMEOUT_S = 10.0


def collect(address: str) -> list[dict[str, Any]]:
    """The status of every instance on the cluster at `address` ("auto": this machine's).

    Raises OptionError, ClusterError where a coordinator does not answer.
    """
    import ray

    with coordinators(address) as found:
        instances = []
        for name, coordinator in found.items():
            try:
                instance = ray.get(coordinator.status.remote(), timeout=_TIMEOUT_S)
            except ray.exceptions.RayError as error:
                raise ClusterError(f"{name}: its coordinator does not answer: {type(error).__name__}") from error
            instance["routers"] = [_router(instance, rank) for rank in range(instance["num_routers"])]
            instances.append(instance)
        return instances


def show(instances: list[dict[str, Any]], as_json: bool) -> None:
    """Print tables, or one JSON document for scripts."""
    if as_json:
        print(json.dumps(instances))
        return
    console = Console(highlight=False)
    if not instances:
        console.print("nothing is served on this cluster")
    for instance in instances:
        console.print(
            f"[bold]{instance['model']}[/bold]  {instance['instance']}  generation {instance['generation']}  "
            f"up {instance['uptime_s']:.0f} s  {instance['checkpoint']}"
        )
        for host in instance["hosts"]:
            if host["state"] == "lost":
                console.print(_lost_host(host, instance["shards"]), soft_wrap=True)
        console.print(_shard_table(instance["shards"]))
        for reason in sorted({shard["compute_reason"] for shard in instance["shards"] if "compute_reason" in shard}):
            console.print(f"experts computed by {reason}")
        console.print(_link_table(instance["routers"]))
        for router in instance["routers"]:
            if "trace" in router:
                ended = f" [red](ended: {router['trace_error']})[/red]" if router["trace_error"] else ""
                where = f"router {router['rank']} records load in {router['trace']}"
                console.print(where + ended, soft_wrap=True)


def _router(instance: dict[str, Any], rank: int) -> dict[str, Any]:
    import ray

    phase = instance["routers"].get(rank, "starting")
    try:
        router = ray.get_actor(f"{instance['instance']}/router-{rank}", namespace=NAMESPACE)
        return {"phase": phase} | ray.get(router.status.remote(), timeout=_TIMEOUT_S)
    except (ValueError, ray.exceptions.RayError) as error:
        return {"rank": rank, "phase": f"no answer: {type(error).__name__}"}


def _lost_host(host: dict[str, Any], shards: list[dict[str, Any]]) -> str:
    there = [str(shard["shard_idx"]) for shard in shards if shard["host"] == host["address"]]
    left = f"; its shards: {', '.join(there)}" if there else "; its shards run elsewhere"
    return f"[red]host {host['address']} is lost: {host['why']}, silent for {host['silent_s']:.0f} s{left}[/red]"


def _shard_table(shards: list[dict[str, Any]]) -> Table:
    table = Table("shard", "state", "node", "pid", "slots", "memory", "requests", "tokens", "shared", "bad", "restarts")
    for shard in shards:
        table.add_row(
            str(shard["shard_idx"]),
            shard["state"] + (f": {shard['error']}" if shard["error"] and shard["state"] != "up" else ""),
            shard.get("node_ip", shard["host"]),
            str(shard.get("pid", "")),
            str(shard.get("num_slots", "")),
            _bytes(shard.get("slot_bytes")),
            str(shard.get("requests", "")),
            str(shard.get("tokens", "")),
            str(shard.get("coalesced", "")),
            str(shard.get("dropped", "")),
            ", ".join(f"{s:.1f} s" for s in shard["restart_seconds"]) or "0",
        )
    return table


def _link_table(routers: list[dict[str, Any]]) -> Table:
    """One row per router and shard."""
    table = Table(
        "router", "phase", "pid", "shard", "way", "round trips", "tokens", "sent", "received", "p50", "p99", "lost"
    )
    for router in routers:
        gaps = router.get("recoveries", [])
        for shard_idx, link in enumerate(router.get("links", [])):
            timed = link["round_trips_us"]
            p50, p99 = (f"{us:.0f} µs" for us in np.percentile(timed, [50, 99])) if timed else ("-", "-")
            table.add_row(
                str(router["rank"]),
                router["phase"],
                str(router["pid"]),
                str(shard_idx),
                link["way"].partition(":")[0],
                str(link["requests"]),
                str(link["tokens"]),
                _bytes(link["bytes_out"]),
                _bytes(link["bytes_in"]),
                p50,
                p99,
                ", ".join(f"{gap['seconds']:.1f} s" for gap in gaps if gap["shard_idx"] == shard_idx) or "0",
            )
        if not router.get("links"):
            table.add_row(str(router["rank"]), router["phase"])
    return table


def _bytes(count: int | None) -> str:
    if count is None:
        return ""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError

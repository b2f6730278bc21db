"""Connections to Ray: joining a cluster, starting a local one, and attaching further processes to either."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
from dataclasses import dataclass

import ray

from ep.errors import OptionError
from ep.link import NAMESPACE, Link

_CONNECT_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Session:
    """This process's place in a Ray cluster. started: this process started the cluster and ends it."""

    address: str
    node_ip: str
    node_id: str
    started: bool


def join_or_start(address: str | None, num_cpus: int) -> Session:
    """Join the cluster at `address` ("auto": any that runs here); start a local one for None.

    num_cpus: CPUs that a local cluster offers. Raises OptionError where no cluster answers at `address`.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:
        # A local cluster lives on loopback and dies with us; without this Ray would leave a token in the home directory
        # that every later `ray start` then needs.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        # Ray runs its workers at niceness 15; shards and routers are what this cluster is for.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # It would start an idle worker for every core, which takes a large machine's cores from what is being started.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        ray.init(
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=128 * 1024 * 1024,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        return _session(started=True)
    if address != "auto":
        _check_reachable(address)
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise OptionError(f"--address {address}: no Ray cluster answers ({str(error).splitlines()[0]})") from None
    return _session(started=False)


def find_started() -> str | None:
    """The address of the cluster that `ray start` made on this machine or RAY_ADDRESS names.

    Ray's own "auto" would also find the local cluster of another `ep serve`, which ends with it.
    """
    from ray._private import services, utils

    address = os.environ.get("RAY_ADDRESS") or utils.read_ray_address()
    return address if address and (address in services.find_gcs_addresses() or "RAY_ADDRESS" in os.environ) else None


def runs_here() -> bool:
    """Whether any Ray cluster runs on this machine, the local one of an `ep serve` included."""
    from ray._private import services

    return bool(os.environ.get("RAY_ADDRESS") or services.find_gcs_addresses())


def connect(link: Link) -> None:
    """Attach a process that vLLM spawned to the cluster of its `ep serve`; a process that is attached stays so."""
    if not ray.is_initialized():
        ray.init(
            address=link.ray_address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address=link.node_ip,
        )


def restore_priority() -> None:
    """Undo the niceness that Ray gives its workers, where this process may (root, or CAP_SYS_NICE)."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)


def _session(started: bool) -> Session:
    context = ray.get_runtime_context()
    return Session(
        address=context.gcs_address,
        node_ip=ray.util.get_node_ip_address(),
        node_id=context.get_node_id(),
        started=started,
    )


def _check_reachable(address: str) -> None:
    """Ray itself retries an address that nobody answers for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise OptionError(f"--address {address}: expected HOST:PORT or auto")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise OptionError(f"--address {address}: no Ray cluster answers ({error})") from None


def cluster_gpus(node_id: str, num_nodes: int | None) -> int:
    """Of this node and as many others as make num_nodes, those with most first; None: of all that live."""
    alive = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]}
    here = alive.pop(node_id, 0)
    others = sorted(alive.values(), reverse=True)
    return here + sum(others if num_nodes is None else others[: num_nodes - 1])


def cluster_memory() -> int:
    """Bytes of memory of all nodes that live, as Ray counts it for its workers."""
    return int(sum(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]))

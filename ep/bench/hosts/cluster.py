"""A Ray cluster of several hosts on this machine, for tests and demonstrations.

Hosts are network namespaces where those are allowed, else Ray nodes on loopback addresses of their own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ep.bench.hosts.link_quality import LinkQuality
from ep.bench.hosts.network import Network, cannot_make_hosts
from ep.bench.hosts.owner import PREFIX, is_left_over, own_name
from ep.bench.server import free_port
from ep.errors import ClusterError, OptionError

_START_S = 120.0
_OBJECT_STORE_BYTES = 100_000_000
_RAY = (sys.executable, "-c", "from ray.scripts.scripts import main; main()")
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    # A host that is cut off is dead to Ray after 9 s; by default after more than a minute.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""For every node, and for everything that connects to the cluster."""


@dataclass(frozen=True)
class HostCluster:
    """Hosts with a Ray node each, the head on the first.

    addresses: by host. ray_address: HOST:PORT of the head. environment: for whatever connects. kind: "namespaces",
    "loopback" or "joined"; why_loopback: what keeps this process from making namespaces, "" where nothing does.
    """

    addresses: tuple[str, ...]
    ray_address: str
    environment: Mapping[str, str]
    kind: str
    why_loopback: str
    folder: Path
    _network: Network | None = field(repr=False)

    def command(self, *words: str, host_idx: int = 0) -> list[str]:
        """What runs `words` on a host."""
        return [*(self._network.inside(host_idx) if self._network is not None else ()), *words]

    def full_environment(self) -> dict[str, str]:
        return {**os.environ, **self.environment}

    def lose(self, host_idx: int) -> None:
        """The host is not heard of any more: its cable is pulled; on loopback all its processes are killed."""
        if self._network is not None:
            self._network.cut(host_idx)
            return
        for process in _processes(self._node_folder(host_idx)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def processes(self) -> list[psutil.Process]:
        """Of all Ray nodes: their servers and their actors."""
        return _processes(self.folder)

    def host_of(self, process: psutil.Process) -> str:
        """The address of the host whose Ray node started this process, or "" where none did."""
        for one in [process, *process.parents()]:
            for host_idx, address in enumerate(self.addresses):
                if any(str(self._node_folder(host_idx)) in word for word in one.cmdline()):
                    return address
        return ""

    def describe(self) -> str:
        """What the hosts are, for people."""
        if self.kind == "joined":
            return f"the nodes of the Ray cluster at {self.ray_address}"
        if self.kind == "namespaces":
            return f"{len(self.addresses)} hosts: network namespaces of one machine"
        return f"{len(self.addresses)} hosts: Ray nodes on loopback addresses of one machine, as {self.why_loopback}"

    def _node_folder(self, host_idx: int) -> Path:
        return self.folder / str(host_idx)


def joined_cluster(address: str) -> HostCluster:
    """A Ray cluster that runs already; of its hosts only this one is used directly, by its loopback address."""
    return HostCluster(("127.0.0.1",), address, {}, "joined", "", Path(), None)


@contextmanager
def host_cluster(
    num_hosts: int, cpus_per_host: int, qualities: Mapping[int, LinkQuality] | None = None
) -> Iterator[HostCluster]:
    """Until the block ends, however it does. qualities: what the links of some hosts do to packets.

    Raises ClusterError where a node does not start, OptionError for a link quality that loopback cannot have.
    """
    with _ends_on_sigterm():
        sweep_folders()
        with _hosts(num_hosts, cpus_per_host, qualities or {}) as cluster:
            yield cluster


@contextmanager
def _hosts(num_hosts: int, cpus_per_host: int, qualities: Mapping[int, LinkQuality]) -> Iterator[HostCluster]:
    why = cannot_make_hosts()
    if why is not None and any(quality != LinkQuality() for quality in qualities.values()):
        raise OptionError(f"a link cannot be given {next(iter(qualities.values())).describe()}: {why}")
    # Ray's sockets lie in it: it has a short name.
    folder = Path(tempfile.mkdtemp(prefix=f"{own_name()}-"))
    network: Network | None = None
    try:
        if why is None:
            network = Network(num_hosts, qualities)
        addresses = network.addresses if network is not None else [f"127.0.0.{2 + i}" for i in range(num_hosts)]
        ray_address = f"{addresses[0]}:{6379 if network is not None else free_port(addresses[0])}"
        kind = "loopback" if network is None else "namespaces"
        cluster = HostCluster(tuple(addresses), ray_address, ENVIRONMENT, kind, why or "", folder, network)
        _start_ray(cluster, 0, cpus_per_host)
        with ThreadPoolExecutor(max(1, num_hosts - 1)) as pool:
            list(pool.map(lambda host_idx: _start_ray(cluster, host_idx, cpus_per_host), range(1, num_hosts)))
        yield cluster
    finally:
        with _undisturbed():
            _end(_processes(folder))
            if network is not None:
                network.close()
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _ends_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM is a Ctrl-C: what was made is taken down."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside, a second Ctrl-C leaves nothing half taken down."""
    if threading.current_thread() is not threading.main_thread():  # which gets the signals
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sweep_folders() -> None:
    """End the Ray nodes whose makers are gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if is_left_over(folder.name):
            _end(_processes(folder))
            shutil.rmtree(folder, ignore_errors=True)


def _start_ray(cluster: HostCluster, host_idx: int, num_cpus: int) -> None:
    host, port = cluster.ray_address.rsplit(":", 1)
    role = ["--head", f"--port={port}", "--include-dashboard=false"] if host_idx == 0 else [f"--address={host}:{port}"]
    # A folder of its own for each: a shared one kills nodes that start at the same time.
    options = [f"--node-ip-address={cluster.addresses[host_idx]}", f"--temp-dir={cluster._node_folder(host_idx)}"]
    options += [f"--num-cpus={num_cpus}", f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats"]
    done = subprocess.run(
        cluster.command(*_RAY, "start", *role, *options, host_idx=host_idx),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=cluster.full_environment(),
        timeout=_START_S,
        check=False,
    )
    if done.returncode != 0:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ClusterError(f"ray start on {cluster.addresses[host_idx]}: {said[-1] if said else done.returncode}")


def _processes(folder: Path) -> list[psutil.Process]:
    """Those that are told the folder, and their children."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter(["cmdline"]):
        if f"{folder}" in " ".join(process.info["cmdline"] or []):
            found[process.pid] = process
    for process in list(found.values()):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.update((child.pid, child) for child in process.children(recursive=True))
    found.pop(os.getpid(), None)
    return list(found.values())


def _end(processes: list[psutil.Process]) -> None:
    for number, patience_s in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0)):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        _, processes = psutil.wait_procs(processes, timeout=patience_s)

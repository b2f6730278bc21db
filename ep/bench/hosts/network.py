"""Hosts on one machine: network namespaces on a bridge, each with a link of its own that can be slowed or cut.

    root namespace .1 ──┐
      host 0      .10 ──┤ bridge, in a namespace of its own
      host 1      .11 ──┘    host's end: link0, bridge's end: port<host>
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from ep.bench.hosts.link_quality import LinkQuality
from ep.bench.hosts.owner import PREFIX, is_left_over, own_name
from ep.errors import ClusterError

_NAMESPACES = Path("/run/netns")
_DEVICE, _BRIDGE = "link0", "bridge0"
_FIRST_HOST = 10
_READY_S = 10.0


def cannot_make_hosts() -> str | None:
    """Why this process may not make network namespaces; None where it may."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} (iproute2) is not installed"
    probe = f"{own_name()}-probe"
    try:
        _run("ip", "netns", "add", probe)
        _run("ip", "-n", probe, "link", "add", _BRIDGE, "type", "bridge")
        _run("ip", "-n", probe, "link", "add", _DEVICE, "type", "veth", "peer", "name", "peer0")
    except ClusterError as error:
        return f"network namespaces are not allowed here ({error})"
    finally:
        with contextlib.suppress(ClusterError):
            _run("ip", "netns", "del", probe)
    return None


class Network:
    """num_hosts namespaces; qualities: what the links of some of them do. `close` takes all of it down.

    Raises ClusterError, with what `ip` or `tc` said, having taken down what was up.
    """

    def __init__(self, num_hosts: int, qualities: Mapping[int, LinkQuality]) -> None:
        sweep()
        self._name = own_name()
        self._bridge = f"{self._name}-bridge"
        self._own_device = f"ep{os.getpid()}"
        self._relays: list[subprocess.Popen] = []
        self._subnet = _free_subnet()
        try:
            self._make_bridge()
            for host_idx in range(num_hosts):
                self._make_host(host_idx, qualities.get(host_idx, LinkQuality()))
        except BaseException:
            self.close()
            raise

    @property
    def addresses(self) -> list[str]:
        """Of the hosts, in order."""
        found = sorted(int(path.name.rpartition("-")[2][4:]) for path in _NAMESPACES.glob(f"{self._name}-host*"))
        return [self._address(host_idx) for host_idx in found]

    def inside(self, host_idx: int) -> tuple[str, ...]:
        """What comes before a command that runs on this host."""
        return ("ip", "netns", "exec", self._host(host_idx))

    def cut(self, host_idx: int) -> None:
        """Pull the host's cable: both sides send into nothing."""
        _run("ip", "-n", self._bridge, "link", "set", f"port{host_idx}", "down")

    def mend(self, host_idx: int) -> None:
        """Put the cable back."""
        _run("ip", "-n", self._bridge, "link", "set", f"port{host_idx}", "up")

    def close(self) -> None:
        """Ends every process in the namespaces too. May be called twice."""
        for relay in self._relays:
            relay.kill()
            relay.wait()
        self._relays = []
        with contextlib.suppress(ClusterError):  # namespaces, with what lies in them, go some time after their names
            _run("ip", "link", "del", self._own_device)
        for path in _NAMESPACES.glob(f"{self._name}-*"):
            _delete(path.name)

    def _make_bridge(self) -> None:
        bridge, mine = self._bridge, self._own_device
        _run("ip", "netns", "add", bridge)
        _run("ip", "-n", bridge, "link", "add", _BRIDGE, "type", "bridge")
        _run("ip", "-n", bridge, "link", "set", _BRIDGE, "up")
        # The way in for this process, whose clients are a host of their own; it goes with the bridge's namespace.
        _run("ip", "link", "add", mine, "type", "veth", "peer", "name", "root0", "netns", bridge)
        _run("ip", "-n", bridge, "link", "set", "root0", "master", _BRIDGE, "up")
        _run("ip", "addr", "add", f"{self._subnet}.1/24", "dev", mine)
        _run("ip", "link", "set", mine, "up")

    def _make_host(self, host_idx: int, quality: LinkQuality) -> None:
        host, bridge, port = self._host(host_idx), self._bridge, f"port{host_idx}"
        ends = ((host, _DEVICE), (bridge, port))
        _run("ip", "netns", "add", host)
        _run("ip", "-n", host, "link", "set", "lo", "up")
        is_relayed = quality.needs_delay and not _has_netem(host)
        if is_relayed:
            self._relay(ends, quality, seed=host_idx)
        else:
            _run("ip", "link", "add", _DEVICE, "netns", host, "type", "veth", "peer", "name", port, "netns", bridge)
        for namespace, device in ends:
            if quality.needs_delay and not is_relayed:
                _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *quality.netem())
            elif quality.rate_mbit is not None:
                _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *quality.tbf())
        _run("ip", "-n", bridge, "link", "set", port, "master", _BRIDGE, "up")
        _run("ip", "-n", host, "addr", "add", f"{self._address(host_idx)}/24", "dev", _DEVICE)
        _run("ip", "-n", host, "link", "set", _DEVICE, "up")
        # Leads nowhere: programs ask for the route to some far address to learn their own.
        _run("ip", "-n", host, "route", "add", "default", "dev", _DEVICE)

    def _relay(self, ends: tuple[tuple[str, str], ...], quality: LinkQuality, seed: int) -> None:
        command = [sys.executable, "-m", "ep.bench.hosts.relay", "--ends", *(":".join(end) for end in ends)]
        command += ["--delay-ms", str(quality.delay_ms), "--loss", str(quality.loss), "--seed", str(seed)]
        # The relay ends with this process: nobody else holds the other end of its standard input.
        relay = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._relays.append(relay)
        assert relay.stdout is not None
        if relay.stdout.readline().strip() != "ready":
            raise ClusterError(f"the relay of {ends[0][0]} ended with exit code {relay.wait(_READY_S)}")

    def _host(self, host_idx: int) -> str:
        return f"{self._name}-host{host_idx}"

    def _address(self, host_idx: int) -> str:
        return f"{self._subnet}.{_FIRST_HOST + host_idx}"


def sweep() -> None:
    """Take down the namespaces, with all that runs in them, whose makers are gone."""
    for path in _NAMESPACES.glob(f"{PREFIX}*"):
        if is_left_over(path.name):
            _delete(path.name)


def _delete(namespace: str) -> None:
    with contextlib.suppress(ClusterError):
        left = [int(pid) for pid in _run("ip", "netns", "pids", namespace).split()]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid) for pid in left if psutil.pid_exists(pid)], timeout=5.0)
    with contextlib.suppress(ClusterError):
        _run("ip", "netns", "del", namespace)


def _has_netem(namespace: str) -> bool:
    try:
        _run("tc", "-n", namespace, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "0ms")
        _run("tc", "-n", namespace, "qdisc", "del", "dev", "lo", "root")
    except ClusterError:
        return False
    return True


def _free_subnet() -> str:
    """The first three numbers of a /24 in 198.18.0.0/15, the range set apart for measurements (RFC 2544)."""
    routes = _run("ip", "-4", "-o", "route", "show", "table", "all")
    for number in range(512):
        subnet = f"198.{18 + number // 256}.{number % 256}"
        if f"{subnet}." not in routes:
            return subnet
    raise ClusterError("198.18.0.0/15: no /24 is free on this machine")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout

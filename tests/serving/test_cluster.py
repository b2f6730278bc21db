"""`ep serve` on a cluster of three hosts that `ray start` made: network namespaces where those are allowed, else Ray
nodes on loopback addresses."""

from __future__ import annotations

import json
import subprocess
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ep.bench.greedy import greedy_tokens
from ep.bench.hosts.cluster import HostCluster, host_cluster
from ep.bench.hosts.link_quality import LinkQuality
from ep.bench.hosts.network import cannot_make_hosts
from ep.bench.hosts.serving import Spread, cluster_status, lost_hosts, start_server
from ep.bench.server import EP_COMMAND, Server, free_port
from ep.errors import EpError
from ep.presets import load_preset
from ep.synthetic import cached_checkpoint
from tests.serving.served import EAGER, ep_environment, run_ep

MODEL = "deepseek-v3"
NUM_HOSTS, CPUS = 3, 2
SLOW = 1
NAMED_S = 10.0
START_S = 180.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[HostCluster]:
    """The link of host SLOW has delay and loss where that can be."""
    why_not = cannot_make_hosts()
    if why_not is not None:
        warnings.warn(f"hosts are Ray nodes on loopback, no link is slow: {why_not}", stacklevel=1)
    qualities = {SLOW: LinkQuality(delay_ms=5, loss=0.01)} if why_not is None else {}
    with host_cluster(NUM_HOSTS, CPUS, qualities) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster")


def serving(
    cluster: HostCluster, num_shards: int, num_nodes: int, logs: Path, transport: str = "socket"
) -> Iterator[Server]:
    checkpoint, trace = cached_checkpoint(load_preset(MODEL)), logs / f"{num_nodes}-{transport}.trace"
    flags = ("--transport", transport, "--trace-window", "0.5", *EAGER, "--max-model-len", "512")
    server = start_server(cluster, MODEL, checkpoint, Spread(num_shards, num_nodes), trace, logs, flags)
    try:
        server.wait_until_ready(START_S)
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def one_node_tokens(cluster: HostCluster, logs: Path) -> list[list[int]]:
    """What one node answers, over memory that router and shards share."""
    for server in serving(cluster, 2, 1, logs, "ipc"):
        found = greedy_tokens(server.url, MODEL, seed=0, num_prompts=4)
    assert not cluster_status(cluster), "nothing is served any more"
    raylets = [p for p in cluster.processes() if p.name() == "raylet"]
    assert len(raylets) == NUM_HOSTS, "a cluster that was joined stays up"
    return found


@pytest.mark.long  # tests/unit/test_ipc_router.py has the same without vLLM
def test_ipc_on_a_node_and_sockets_between_nodes_in_one_layer(
    cluster: HostCluster, logs: Path, one_node_tokens: list[list[int]]
) -> None:
    for server in serving(cluster, 4, 2, logs, "ipc"):
        assert greedy_tokens(server.url, MODEL, seed=0, num_prompts=4) == one_node_tokens
        (instance,) = cluster_status(cluster)
        links = instance["routers"][0]["links"]
    hosts = [shard["host"] for shard in instance["shards"]]
    assert [link["way"].partition(":")[0] for link in links] == ["ipc" if host == hosts[0] else "tcp" for host in hosts]
    assert len(set(hosts)) == 2 and all(link["requests"] > 0 and link["pairs"] > 0 for link in links)


@pytest.fixture(scope="module")
def two_nodes(cluster: HostCluster, logs: Path, one_node_tokens: list[list[int]]) -> Iterator[Server]:
    yield from serving(cluster, 4, 2, logs)


def shards(cluster: HostCluster) -> list[dict[str, Any]]:
    (instance,) = cluster_status(cluster)
    return instance["shards"]


def host_state(cluster: HostCluster, address: str) -> dict[str, Any]:
    (instance,) = cluster_status(cluster)
    (host,) = (host for host in instance["hosts"] if host["address"] == address)
    return host


def test_resources_that_do_not_come(cluster: HostCluster) -> None:
    """Waiting is visible and ends with a clear error."""
    arguments = ("serve", MODEL, "--synthetic", "--shards", "4", "--shard-cpus", "3", "--port", str(free_port()))
    command = cluster.command(*EP_COMMAND[:-1], *arguments, "--address", cluster.ray_address, "--wait", "5")
    result = subprocess.run(
        command,
        env=ep_environment(cluster.environment),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("ep: ")]
    assert "4 x 3 CPU" in line and "gave up after 5 s" in line


def test_two_nodes_answer_as_one(cluster: HostCluster, two_nodes: Server, one_node_tokens: list[list[int]]) -> None:
    """Also over a link with 5 ms delay and 1% loss."""
    assert greedy_tokens(two_nodes.url, MODEL, seed=0, num_prompts=4) == one_node_tokens
    assert [shard["host"] for shard in shards(cluster)] == [cluster.addresses[0]] * 2 + [cluster.addresses[1]] * 2
    (instance,) = cluster_status(cluster)
    links = instance["routers"][0]["links"]
    assert [link["way"].split(":")[0] for link in links] == ["unix", "unix", "tcp", "tcp"]
    assert all(link["bytes_in"] > 0 for link in links)
    assert [host["state"] for host in instance["hosts"]] == ["up", "up"]


def test_the_report_names_the_slow_link(cluster: HostCluster, two_nodes: Server, logs: Path) -> None:
    report = run_ep("report", str(logs / "2-socket.trace"), "--no-html")
    assert report.returncode == 0, report.stderr
    (line,) = [line for line in report.stdout.splitlines() if "slowest link" in line]
    numbers = json.loads(run_ep("report", str(logs / "2-socket.trace"), "--json", "--no-html").stdout)
    trips = {shard["shard"]: shard["round_trip_us_p50"] for shard in numbers["shards"]}
    assert f"shard {max(trips, key=trips.__getitem__)} on" in line
    if cluster.kind == "namespaces":
        assert f"on {cluster.addresses[SLOW]}" in line
        assert min(trips[2], trips[3]) > 10e3 > 2 * max(trips[0], trips[1]), trips


def test_hosts_that_are_lost(cluster: HostCluster, two_nodes: Server, one_node_tokens: list[list[int]]) -> None:
    """The first one's shards move to the third host. Then there is no room for them any more: requests end with an
    error that names the host."""
    for host_idx in (1, 2):
        address = cluster.addresses[host_idx]
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(answer, two_nodes)
            time.sleep(0.3)
            cluster.lose(host_idx)
            start = time.monotonic()
            while not any(address in sentence for sentence in lost_hosts(cluster)):
                assert time.monotonic() - start < 6 * NAMED_S
            assert host_state(cluster, address)["lost_after_s"] < NAMED_S, "however long `ep status` takes to start"
            found, ended = running.result(), time.monotonic() - start
        if host_idx == 1:
            assert found == one_node_tokens
            assert [shard["host"] for shard in shards(cluster)][2:] == [cluster.addresses[2]] * 2
        else:
            assert isinstance(found, str) and ended < NAMED_S, found
            assert "shard 2" in found or "shard 3" in found, found
            assert f"host {address} is lost" in found and "no other host has 1 CPU free" in found
            states = [(shard["host"], shard["state"]) for shard in shards(cluster)]
            assert states == [(cluster.addresses[0], "up")] * 2 + [(address, "failed")] * 2
    start = time.monotonic()
    assert "is lost" in str(answer(two_nodes)) and time.monotonic() - start < 3.0, "the next request need not wait"


def answer(server: Server) -> list[list[int]] | str:
    """To the fixed prompts: tokens, or what the server said instead."""
    try:
        return greedy_tokens(server.url, MODEL, seed=0, num_prompts=4)
    except EpError as error:
        return str(error)

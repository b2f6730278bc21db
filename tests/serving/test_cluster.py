"""`ep serve` on a cluster that `ray start` made: two nodes on one machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from openai import OpenAI

from tests.serving.served import ep_environment, free_port, run_ep, serve

RAY = Path(sys.executable).parent / "ray"
HOSTS = ("127.0.0.2", "127.0.0.3")
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled"}


@pytest.fixture
def cluster() -> Iterator[str]:
    """Two Ray nodes on loopback addresses of their own; the address of the head."""
    address = f"{HOSTS[0]}:{free_port()}"
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # sockets lie in it: pytest's own folders have too long names
    try:
        for place, host in enumerate(HOSTS):
            role = ["--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"]
            options = [f"--node-ip-address={host}", "--num-cpus=2", "--object-store-memory=100000000"]
            command = [RAY, "start", *(role if place == 0 else [f"--address={address}"]), *options]
            command += [f"--temp-dir={folder}/{place}", "--disable-usage-stats"]
            subprocess.run(command, env=ep_environment(ENVIRONMENT), check=True, capture_output=True, timeout=120)
        yield address
        raylets = [p for p in _processes(folder) if "raylet/raylet" in " ".join(p.cmdline())]
        assert len(raylets) == len(HOSTS), "a cluster that was joined stays up"
    finally:
        left = _processes(folder)
        for process in left:
            process.terminate()
        for process in psutil.wait_procs(left, timeout=10)[1]:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_two_nodes(cluster: str, tmp_path: Path) -> None:
    arguments = ("--synthetic", "--shards", "4", "--address", cluster, "--", "--max-model-len", "512")
    with serve("deepseek-v3", *arguments, folder=tmp_path, environment=ENVIRONMENT) as server:
        client = OpenAI(base_url=server.base_url, api_key="none", timeout=60)
        answer = client.completions.create(model="deepseek-v3", prompt="Two nodes", max_tokens=32, temperature=0)
        assert answer.usage is not None and answer.usage.completion_tokens == 32
        found = run_ep("status", "--json", "--address", cluster, environment=ENVIRONMENT)
        assert found.returncode == 0, found.stderr
        (instance,) = json.loads(found.stdout)
        nodes = [shard["node_id"] for shard in instance["shards"]]
        assert sorted(nodes.count(node) for node in set(nodes)) == [2, 2]
        links = instance["routers"][0]["links"]
        assert sorted(link["way"].split(":")[0] for link in links) == ["tcp", "tcp", "unix", "unix"]
        assert all(link["bytes_in"] > 0 for link in links)


def test_resources_that_do_not_come(cluster: str) -> None:
    """Waiting is visible and ends with a clear error."""
    port = str(free_port())
    arguments = ("serve", "deepseek-v3", "--synthetic", "--shards", "4", "--shard-cpus", "3", "--port", port)
    result = run_ep(*arguments, "--address", cluster, "--wait", "5", environment=ENVIRONMENT)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("ep: ")]
    assert "4 x 3 CPU" in line and "gave up after 5 s" in line


def _processes(folder: Path) -> list[psutil.Process]:
    """The cluster's processes: all are told its folder."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]

"""`ep serve` with real vLLM and Ray on two GPUs, or on one that all share: tokens however the experts are reached, and
a killed shard."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import pytest
import torch

from ep.bench.greedy import greedy_answer, greedy_client, greedy_prompts, greedy_tokens
from ep.presets import load_preset
from tests.serving.served import Served, serve

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
    pytest.mark.timeout(900),
]
MODEL, NUM_PROMPTS = "deepseek-v3", 32
VLLM = (
    *("--max-model-len", "2048", "--max-num-seqs", "64", "--kv-cache-memory-bytes", str(1 << 28)),
    *("--gpu-memory-utilization", "0.2", "--cudagraph-capture-sizes", "1", "2", "4", "8", "16", "32", "64"),
)
HALF_ROUTER, HALF_SHARD = (
    (("--router-gpus", "0.5"), ("--shard-gpus", "0.5")) if torch.cuda.device_count() == 1 else ((), ())
)
LOCAL = ("--transport", "local", "--shards", "1")
APART = ("--transport", "ipc", "--shards", "1", "--no-share-gpus", *HALF_ROUTER, *HALF_SHARD)
WAYS = {
    "local": (LOCAL, VLLM),
    "apart": (APART, VLLM),
    "shared": (("--transport", "ipc", "--shards", "2", "--routers", "2", "--share-gpus", *HALF_ROUTER), VLLM),
    "socket": (("--transport", "socket", "--shards", "1", *HALF_ROUTER, *HALF_SHARD), VLLM),
    "local, eager": (LOCAL, (*VLLM, "--enforce-eager")),
    "apart, eager": (APART, (*VLLM, "--enforce-eager")),
}
AT_ONCE = 3
"""Servers that start at the same time: each compiles."""
START_S = 400.0


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    with ExitStack() as stack, ThreadPoolExecutor(AT_ONCE) as pool:

        def start(way: str) -> Served:
            flags, vllm_flags = WAYS[way]
            words = (MODEL, "--synthetic", "--address", "local", *flags, "--", *vllm_flags)
            folder = tmp_path_factory.mktemp("serve")
            return stack.enter_context(serve(*words, folder=folder, start_s=START_S))

        yield dict(zip(WAYS, pool.map(start, WAYS), strict=True))


@pytest.fixture(scope="module")
def tokens(servers: dict[str, Served]) -> dict[str, list[list[int]]]:
    """Of one request after the other, by way."""
    return {
        way: greedy_tokens(server.base_url.removesuffix("/v1"), MODEL, 0, NUM_PROMPTS)
        for way, server in servers.items()
    }


def together(server: Served, num_at_once: int) -> list[list[int]]:
    """The same prompts, several in flight."""
    with greedy_client(server.base_url.removesuffix("/v1")) as client, ThreadPoolExecutor(num_at_once) as pool:
        return list(pool.map(partial(greedy_answer, client, MODEL), greedy_prompts(0, NUM_PROMPTS)))


@pytest.mark.parametrize(
    ("way", "other"),
    [("apart", "local"), ("shared", "local"), ("socket", "apart"), ("apart, eager", "local, eager")],
)
def test_tokens_do_not_depend_on_where_experts_are(tokens: dict[str, list[list[int]]], way: str, other: str) -> None:
    assert len({tuple(answer) for answer in tokens[way]}) == NUM_PROMPTS
    differ = [place for place, pair in enumerate(zip(tokens[way], tokens[other], strict=True)) if pair[0] != pair[1]]
    assert not differ, f"{len(differ)} of {NUM_PROMPTS} answers differ between {way} and {other}"


def test_load_is_counted_where_the_router_holds_all_slots(
    servers: dict[str, Served], tokens: dict[str, list[list[int]]]
) -> None:
    spec, counted = load_preset(MODEL).synthetic_spec, servers["local"].status()["routers"][0]["links"][0]
    assert counted["tokens"] > sum(map(len, tokens["local"]))
    assert counted["pairs"] == counted["tokens"] * spec.top_k and counted["tokens"] % spec.num_moe_layers == 0


def test_two_routers_at_once(servers: dict[str, Served], tokens: dict[str, list[list[int]]]) -> None:
    assert together(servers["shared"], 8) == tokens["shared"]
    routers = servers["shared"].status()["routers"]
    assert len(routers) == 2 and all(any(link["requests"] for link in router["links"]) for router in routers)


def test_a_shard_killed_under_load(servers: dict[str, Served], tokens: dict[str, list[list[int]]]) -> None:
    server = servers["apart"]
    (shard,) = server.status()["shards"]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(together, server, 16)
        time.sleep(0.3)
        os.kill(shard["pid"], signal.SIGKILL)
        assert running.result(120) == tokens["apart"]
    assert together(server, 4) == tokens["apart"]

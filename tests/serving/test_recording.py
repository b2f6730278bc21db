"""The trace and the metrics of a server, against the requests that it was sent."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from ep.trace import Trace, parse_trace, read_trace
from tests.serving.served import EAGER, Served, run_ep, serve

MODEL = "deepseek-v3"
NUM_SHARDS = 2
LENGTHS = [(2, 5), (7, 20), (40, 12), (64, 33)]
"""Prompt and output tokens of the requests, all at once; then, alone, those of LAST just before the server stops."""
LAST = (11, 4)
METRICS_S = 20.0
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

# What `ep report --live` does: asks the router for its trace.
ASK = """
import sys, ray
from ep.cluster.session import join_or_start
join_or_start(sys.argv[1], num_cpus=0)
router = ray.get_actor(sys.argv[2] + "/router-0", namespace="ep")
load = ray.get(router.loads.remote(600.0))
sys.stderr.write(f"pairs {load.counts.sum()} {load.pairs.sum()} {load.seconds > 0} {(load.compute_ns > 0).all()}")
sys.stdout.buffer.write(ray.get(router.trace_bytes.remote()))
"""


@dataclass(frozen=True)
class Recorded:
    """live: the trace as the running server gave it; trace: as it was left. samples: of /metrics."""

    path: Path
    live: Trace
    trace: Trace
    load: str
    samples: Samples
    status: dict[str, Any]
    table: str
    output: str


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("recording")
    path = folder / "served.trace"
    arguments = ("--synthetic", "--address", "local", "--shards", str(NUM_SHARDS), "--spare-slots", "0")
    with serve(MODEL, *arguments, "--trace", str(path), "--trace-window", "1", *EAGER, folder=folder) as served:
        with ThreadPoolExecutor(len(LENGTHS)) as pool:
            list(pool.map(lambda lengths: request(served, *lengths), LENGTHS))
        status = served.status()
        asked = subprocess.run(
            [sys.executable, "-c", ASK, served.ray_address, status["instance"]],
            capture_output=True,
            env=dict(served.environment),
            check=True,
        )
        table = run_ep("status", "--address", served.ray_address, environment=served.environment).stdout
        samples = metrics(served, status["routers"][0]["links"])
        request(served, *LAST)
    load = next(line for line in asked.stderr.decode().splitlines() if "pairs " in line)
    yield Recorded(
        path,
        parse_trace(asked.stdout, "live"),
        read_trace(path),
        load[load.index("pairs ") :],
        samples,
        status,
        table,
        served.output.read_text(),
    )


def request(served: Served, num_prompt: int, num_output: int) -> None:
    prompt = [3 + (num_prompt * 31 + 7 * place) % 900 for place in range(num_prompt)]
    done = OpenAI(base_url=served.base_url, api_key="none", max_retries=0, timeout=120).completions.create(
        model=MODEL, prompt=prompt, max_tokens=num_output, temperature=0, extra_body={"ignore_eos": True}
    )
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (num_prompt, num_output)


def metrics(served: Served, links: list[dict[str, Any]]) -> Samples:
    """Once the thread that asks for them has caught up with the counters of `links` and a window has closed."""
    deadline = time.monotonic() + METRICS_S
    while True:
        samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(served.get("/metrics"))
            for sample in family.samples
        }
        tokens = [samples.get(("ep_shard_tokens_total", frozenset({("shard", str(i))}))) for i in range(len(links))]
        window = any(name == "ep_layer_imbalance" for name, _ in samples)
        if (window and tokens == [link["tokens"] for link in links]) or time.monotonic() > deadline:
            return samples
        time.sleep(0.5)


def check(trace: Trace, lengths: list[tuple[int, int]]) -> None:
    """A request's first token comes out of its prompt's step: it decodes one token less than it generates."""
    spec = trace.header.spec
    prefill = sum(prompt for prompt, _ in lengths)
    decode = sum(output - 1 for _, output in lengths)
    assert sum(window.num_prefill_tokens for window in trace.windows) == prefill
    assert sum(window.num_decode_tokens for window in trace.windows) == decode
    for phase, tokens in (("prefill", prefill), ("decode", decode)):
        pairs = sum(window.counts(phase) for window in trace.windows)  # type: ignore[arg-type]
        assert pairs.shape == (spec.num_moe_layers, spec.num_experts)
        assert (pairs.sum(axis=1) == tokens * spec.top_k).all()
    all_pairs = (prefill + decode) * spec.top_k * spec.num_moe_layers
    links = [link for window in trace.windows for link in window.links]
    assert sum(link.pairs for link in links) == all_pairs
    assert sum(int(link.round_trips.sum()) for link in links) == sum(link.requests for link in links) > 0


def test_the_trace_counts_every_token_once(recorded: Recorded) -> None:
    check(recorded.live, LENGTHS)
    check(recorded.trace, [*LENGTHS, LAST])
    assert recorded.trace.warnings == ()
    pairs = sum(sum(lengths) - 1 for lengths in LENGTHS) * 8 * 3
    assert recorded.load == f"pairs {pairs} {pairs} True True"


def test_header_and_windows(recorded: Recorded) -> None:
    header, windows = recorded.trace.header, recorded.trace.windows
    placement = header.placement
    assert header.model == MODEL and header.spec.num_experts == placement.num_experts == 256
    assert (placement.generation, placement.num_moe_layers, placement.num_shards) == (0, 3, NUM_SHARDS)
    assert len(set(header.node_of_shard + header.node_of_router)) == 1 and len(header.node_of_shard) == NUM_SHARDS
    assert set(header.versions) == {"ep", "vllm", "torch"}
    assert [window.generation for window in windows] == [0] * len(windows)
    assert all(0 < window.seconds < 1 + window.step_seconds_p99 + 0.5 for window in windows)
    steps = np.cumsum([0, *(window.num_steps for window in windows)])
    assert [window.first_step for window in windows] == steps[:-1].tolist()
    sampled = np.concatenate([window.sampled_ids for window in windows])
    assert sampled.shape[1:] == (3, 8) and 0 < len(sampled) <= steps[-1]
    assert all(len(set(ids)) == 8 for token in sampled for ids in token.tolist())


def test_metrics_beside_vllm(recorded: Recorded) -> None:
    def value(name: str, **labels: str) -> float:
        return recorded.samples[name, frozenset(labels.items())]

    assert any(name.startswith("vllm:") for name, _ in recorded.samples)
    (router,) = recorded.status["routers"]
    for shard_idx, link in enumerate(router["links"]):
        shard = str(shard_idx)
        assert value("ep_shard_tokens_total", shard=shard) == link["tokens"] > 0
        assert value("ep_shard_pairs_total", shard=shard) == link["pairs"] > link["tokens"]
        for direction in ("out", "in"):
            assert value("ep_shard_bytes_total", shard=shard, direction=direction) == link[f"bytes_{direction}"]
        assert value("ep_shard_up", shard=shard) == 1
        assert value("ep_shard_slots", shard=shard) == recorded.status["shards"][shard_idx]["num_slots"] > 0
        trips = value("ep_round_trip_seconds_count", shard=shard)
        assert value("ep_round_trip_seconds_bucket", shard=shard, le="+Inf") == trips == link["requests"]
        assert 1e-5 < value("ep_round_trip_seconds_sum", shard=shard) / trips < 1
    assert value("ep_placement_generation") == 0
    for layer in recorded.trace.header.spec.moe_layers:
        assert 0 <= value("ep_layer_imbalance", layer=str(layer), phase="decode") <= NUM_SHARDS - 1


def test_the_trace_is_named(recorded: Recorded) -> None:
    (router,) = recorded.status["routers"]
    assert router["trace"] == str(recorded.path) and router["trace_error"] is None
    assert f"records load in {recorded.path}" in recorded.table
    assert f"load is recorded in {recorded.path}" in recorded.output.replace("\n", "")
    rows = [line.split("│") for line in recorded.table.splitlines() if "│ serving" in line]
    pids = [row[3].strip() for row in rows]
    assert len(rows) == NUM_SHARDS and pids == [str(router["pid"])] * NUM_SHARDS

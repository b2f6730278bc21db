"""What Prometheus reads, from plain answers of actors."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ep.link_stats import LinkStats
from ep.load import round_trip_histogram
from ep.metrics import ClusterMetrics
from ep.metrics_file import MetricsFile

TIMES_US = (3.0, 8.0, 300.0, 301.0, 5e4, 9e7)
NAMES = {
    "ep_shard_tokens",
    "ep_shard_pairs",
    "ep_shard_bytes",
    "ep_layer_imbalance",
    "ep_round_trip_seconds",
    "ep_placement_generation",
    "ep_shard_slots",
    "ep_rebalances",
    "ep_shard_up",
}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def router(scale: int) -> dict[str, Any]:
    links = []
    for shard_idx in range(2):
        link = LinkStats(bytes_out=1000 * scale)
        for time_us in TIMES_US:
            link.count(scale, 2 * scale * (shard_idx + 1), 10 * scale, 5, time_us)
        links.append(link.to_dict())
    window = {"layers": [3, 4], "prefill": [[30.0, 10.0], [0.0, 0.0]], "decode": [[5.0, 5.0], [1.0 * scale, 0.0]]}
    return {"links": links, "num_slots": [4, 4], "last_window": window}


def answers(**coordinator: Any) -> dict[str, Any]:
    shards = [{"shard_idx": 0, "state": "up"}, {"shard_idx": 1, "state": "loading"}]
    return {"coordinator": {"generation": 7, "shards": shards} | coordinator, "routers": [router(1), router(2)]}


def scrape(registry: CollectorRegistry) -> tuple[Samples, dict[str, str]]:
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    samples = {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}
    return samples, {family.name: family.type for family in families}


def collected(ask: Any) -> tuple[Samples, dict[str, str]]:
    """What a scrape finds once there are answers."""
    registry, asked = CollectorRegistry(), threading.Event()

    def ask_once() -> Any:
        try:
            return ask()
        finally:
            asked.set()

    metrics = ClusterMetrics(ask_once, every_s=0.01, registry=registry)
    metrics.start()
    for _ in range(2):  # the second question comes after the first answer was taken
        asked.clear()
        assert asked.wait(10)
    found = scrape(registry)
    metrics.stop()
    assert scrape(registry) == ({}, {})
    return found


def test_every_metric_has_its_name_and_type() -> None:
    samples, types = collected(lambda: answers(rebalances={"moved": 2, "refused": 1}))
    assert set(types) == NAMES
    assert types["ep_round_trip_seconds"] == "histogram" and types["ep_layer_imbalance"] == "gauge"
    assert types["ep_shard_tokens"] == "counter"
    names = {name for name, _ in samples}
    assert {"ep_shard_tokens_total", "ep_shard_pairs_total", "ep_shard_bytes_total", "ep_rebalances_total"} <= names


def test_values_are_added_up_over_routers() -> None:
    samples, _ = collected(lambda: answers(rebalances={"moved": 2}))

    def value(name: str, **labels: str) -> float:
        return samples[name, frozenset(labels.items())]

    num = len(TIMES_US)
    for shard in (0, 1):
        assert value("ep_shard_tokens_total", shard=str(shard)) == num * 3
        assert value("ep_shard_pairs_total", shard=str(shard)) == num * 3 * 2 * (shard + 1)
        assert value("ep_shard_bytes_total", shard=str(shard), direction="out") == 3000
        assert value("ep_shard_bytes_total", shard=str(shard), direction="in") == num * 30
        assert value("ep_shard_slots", shard=str(shard)) == 4
    assert value("ep_placement_generation") == 7
    assert value("ep_rebalances_total", outcome="moved") == 2
    assert (value("ep_shard_up", shard="0"), value("ep_shard_up", shard="1")) == (1, 0)
    # Layer 3: prefill 60, 20 of the two routers; layer 4: no prefill, and all decode on one shard.
    assert value("ep_layer_imbalance", layer="3", phase="prefill") == pytest.approx(0.5)
    assert value("ep_layer_imbalance", layer="3", phase="decode") == 0
    assert value("ep_layer_imbalance", layer="4", phase="decode") == pytest.approx(1.0)
    assert ("ep_layer_imbalance", frozenset({("layer", "4"), ("phase", "prefill")})) not in samples


def test_round_trips_lie_below_their_bounds() -> None:
    samples, _ = collected(answers)
    buckets = {
        dict(labels)["le"]: count
        for (name, labels), count in samples.items()
        if name == "ep_round_trip_seconds_bucket" and ("shard", "1") in labels
    }
    shard = frozenset({("shard", "1")})
    assert buckets.pop("+Inf") == samples["ep_round_trip_seconds_count", shard] == 2 * len(TIMES_US)
    for bound, count in buckets.items():
        assert count == 2 * sum(time_us <= float(bound) * 1e6 * (1 + 1e-5) for time_us in TIMES_US), bound
    assert 1 < len(buckets) < len(round_trip_histogram([])) / 1.5
    assert samples["ep_round_trip_seconds_sum", shard] == pytest.approx(2 * sum(TIMES_US) / 1e6)


def test_shards_in_the_routers_process_are_up_with_it() -> None:
    samples, _ = collected(lambda: answers(shards=[]))
    assert [samples["ep_shard_up", frozenset({("shard", shard)})] for shard in ("0", "1")] == [1, 1]


def test_parts_that_do_not_answer_have_no_samples() -> None:
    samples, _ = collected(lambda: {"coordinator": answers()["coordinator"], "routers": []})
    assert {name for name, _ in samples} == {"ep_placement_generation", "ep_shard_up"}
    recording_off = [router(1) | {"last_window": None}]
    samples, _ = collected(lambda: {"coordinator": {"generation": 0}, "routers": recording_off})
    assert not any(name == "ep_layer_imbalance" for name, _ in samples)

    def fail() -> Any:
        raise OSError("no cluster")

    assert collected(fail)[0] == {}


def test_other_metrics_of_the_registry_stay() -> None:
    registry = CollectorRegistry()
    Counter("vllm_requests", "Of vLLM.", registry=registry).inc()
    metrics = ClusterMetrics(answers, registry=registry)
    metrics.start()
    samples, _ = scrape(registry)
    metrics.stop()
    assert samples["vllm_requests_total", frozenset()] == 1
    assert np.isfinite(list(samples.values())).all()


def test_another_process_shows_the_same_from_a_file(tmp_path: Path) -> None:
    file, registry, other = tmp_path / "cluster.prom", CollectorRegistry(), CollectorRegistry()
    other.register(MetricsFile(file))
    assert generate_latest(other) == b""
    metrics = ClusterMetrics(lambda: answers(), every_s=0.01, registry=registry, file=file)
    metrics.start()
    try:
        deadline = time.monotonic() + 10
        while not generate_latest(other):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert generate_latest(other) == generate_latest(registry) != b""
    finally:
        metrics.stop()
    assert not file.exists() and generate_latest(other) == b""

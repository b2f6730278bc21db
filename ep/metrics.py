"""Prometheus metrics of the routers and shards, shown by vLLM's own /metrics.

A thread asks the actors every few seconds; a scrape only reads the last answers, so it never waits for the cluster. A
part that did not answer has no samples until it does.

Shape legend: L MoE layers, S shards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from ep.load import ROUND_TRIP_BOUNDS_US
from ep.metrics_file import write
from ep.planning.imbalance import imbalance

ASK_EVERY_S = 5.0
_STOP_S = 1.0
_BOUND_STRIDE = 2
"""Half an octave: a series for each of the trace's buckets is more than a dashboard needs."""

Answers = dict[str, Any]
"""`Launch.metrics`: {"coordinator": Coordinator.status(), "routers": [RouterActor.metrics(), ...]}."""


class ClusterMetrics(Collector):
    """Asks in a thread between `start` and `stop`, and is meanwhile a collector of the registry.

    ask: returns the answers; whatever it raises means that there are none. file: written after every answer, for
    processes that show the same (ep/metrics_file.py).
    """

    def __init__(
        self,
        ask: Callable[[], Answers],
        every_s: float = ASK_EVERY_S,
        registry: CollectorRegistry = REGISTRY,
        file: Path | None = None,
    ) -> None:
        self._ask = ask
        self._every_s = every_s
        self._registry = registry
        self._file = file
        self._answers: Answers | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="metrics")

    def start(self) -> None:
        self._registry.register(self)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._registry.unregister(self)
        self._thread.join(_STOP_S)
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def describe(self) -> Iterable[Metric]:
        return families({"coordinator": {}, "routers": []})

    def collect(self) -> Iterable[Metric]:
        answers = self._answers
        return () if answers is None else families(answers)

    def _run(self) -> None:
        while True:
            try:
                self._answers = self._ask()
            except Exception:  # actors die in many ways; none of them is the scraper's concern
                self._answers = None
            if self._file is not None:
                with suppress(OSError):  # a full disk: the next answers may find room
                    write(self._file, self)
            if self._stopped.wait(self._every_s):
                return


def families(answers: Answers) -> list[Metric]:
    """The metrics of all shards, added up over routers."""
    coordinator, routers = answers["coordinator"], answers["routers"]
    return [
        *_traffic(routers),
        _round_trips(routers),
        _imbalance(routers),
        *_placement(coordinator, routers),
        _rebalances(coordinator),
        _up(coordinator, routers),
    ]


def _traffic(routers: Sequence[Answers]) -> list[Metric]:
    tokens = CounterMetricFamily("ep_shard_tokens", "Rows sent to the shard, a token once per layer.", labels=["shard"])
    pairs = CounterMetricFamily("ep_shard_pairs", "(token, slot) pairs computed by the shard.", labels=["shard"])
    moved = CounterMetricFamily(
        "ep_shard_bytes", "Payload bytes to the shard (out) and back (in).", labels=["shard", "direction"]
    )
    for shard, links in _by_shard(routers):
        tokens.add_metric([shard], sum(link["tokens"] for link in links))
        pairs.add_metric([shard], sum(link["pairs"] for link in links))
        for direction in ("out", "in"):
            moved.add_metric([shard, direction], sum(link[f"bytes_{direction}"] for link in links))
    return [tokens, pairs, moved]


def _round_trips(routers: Sequence[Answers]) -> Metric:
    family = HistogramMetricFamily(
        "ep_round_trip_seconds", "From the dispatch of a layer's tokens to the shard's answer.", labels=["shard"]
    )
    bounds = [f"{bound / 1e6:.6g}" for bound in ROUND_TRIP_BOUNDS_US[::_BOUND_STRIDE]]
    for shard, links in _by_shard(routers):
        below = np.cumsum(np.sum([link["histogram"] for link in links], axis=0))
        counts = below[: len(ROUND_TRIP_BOUNDS_US) : _BOUND_STRIDE].tolist()
        buckets = [*zip(bounds, counts, strict=True), ("+Inf", int(below[-1]))]
        family.add_metric([shard], buckets, sum(link["round_trip_us_sum"] for link in links) / 1e6)
    return family


def _imbalance(routers: Sequence[Answers]) -> Metric:
    family = GaugeMetricFamily(
        "ep_layer_imbalance",
        "(max - mean) / mean of pairs over shards in the last closed window under the current placement; layer as in "
        "the checkpoint.",
        labels=["layer", "phase"],
    )
    windows = [router["last_window"] for router in routers if router.get("last_window")]
    for phase in ("prefill", "decode"):
        if windows:
            load = np.sum([window[phase] for window in windows], axis=0)
            excess = imbalance(load).excess
            for layer, one, total in zip(windows[0]["layers"], excess, load.sum(axis=1), strict=True):
                if total > 0:
                    family.add_metric([str(layer), phase], float(one))
    return family


def _placement(coordinator: Answers, routers: Sequence[Answers]) -> list[Metric]:
    generation = GaugeMetricFamily("ep_placement_generation", "Generation of the placement that is served.")
    slots = GaugeMetricFamily("ep_shard_slots", "Slots for experts, per layer.", labels=["shard"])
    if "generation" in coordinator:
        generation.add_metric([], coordinator["generation"])
    if routers:
        for shard, num_slots in enumerate(routers[0]["num_slots"]):
            slots.add_metric([str(shard)], num_slots)
    return [generation, slots]


def _rebalances(coordinator: Answers) -> Metric:
    family = CounterMetricFamily("ep_rebalances", "Attempts to rebalance, by what they came to.", labels=["outcome"])
    for outcome, count in sorted(coordinator.get("rebalances", {}).items()):
        family.add_metric([outcome], count)
    return family


def _up(coordinator: Answers, routers: Sequence[Answers]) -> Metric:
    """Shards in the router's own process (--transport local) are up as long as it answers."""
    family = GaugeMetricFamily("ep_shard_up", "1 while the shard serves, 0 while it does not.", labels=["shard"])
    if coordinator.get("shards"):
        for shard in coordinator["shards"]:
            family.add_metric([str(shard["shard_idx"])], shard["state"] == "up")
    else:
        for shard, _ in _by_shard(routers):
            family.add_metric([shard], 1)
    return family


def _by_shard(routers: Sequence[Answers]) -> list[tuple[str, tuple[Answers, ...]]]:
    """Every shard's links, one of each router."""
    return [(str(shard), links) for shard, links in enumerate(zip(*(router["links"] for router in routers)))]

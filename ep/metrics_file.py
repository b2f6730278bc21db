"""Metrics of one process that another one shows, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry


class MetricsFile(Collector):
    """What the file says now; nothing where there is none."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except OSError:
            return
        yield from text_string_to_metric_families(text)


def write(path: Path, collector: Collector) -> None:
    """What the collector says now, in one piece. Raises OSError."""
    registry = CollectorRegistry()
    registry.register(collector)
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(generate_latest(registry))
    partial.rename(path)

"""Several API server processes in front of the same engines: vLLM's `--api-server-count`.

    clients ─> one port, a socket of it in every process ─> API server 0, 1, .. ─> engines

Each process is vLLM's own, with what ours adds to it: errors that name their cause, and the cluster's metrics, which
the process that started them keeps in a file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import multiprocess
from prometheus_client.metrics_core import Metric
from vllm.entrypoints.cli import serve as cli
from vllm.v1.utils import run_api_server_worker_proc

from ep.engine.swap import swapped
from ep.metrics_file import MetricsFile


def run(args: argparse.Namespace, metrics: Path, serve: Callable[..., Any]) -> None:
    """Serve until SIGINT or SIGTERM. metrics: the file with the cluster's; serve: calls what it is given, in an API
    server's process. Raises RuntimeError when one of them or an engine ends."""
    make = partial(cli.APIServerProcessManager, target_server_fn=partial(_serve, metrics, serve))
    with swapped(cli, "APIServerProcessManager", make):
        try:
            cli.run_multi_api_server(args)
        except SystemExit:  # how it answers a signal
            return


def _serve(metrics: Path, serve: Callable[..., Any], *positional: Any, **options: Any) -> None:
    """One process."""
    ours = MetricsFile(metrics)

    class AllMetrics(multiprocess.MultiProcessCollector):
        """By which vLLM's /metrics finds those of all API servers."""

        def collect(self) -> Iterator[Metric]:
            yield from super().collect()
            yield from ours.collect()

    with swapped(multiprocess, "MultiProcessCollector", AllMetrics):
        serve(partial(run_api_server_worker_proc, *positional, **options))

"""The command lines of the benchmarks on several hosts."""

from __future__ import annotations

import signal
import sys
from typing import Any

import click


@click.command("soak")
@click.argument("model", default="deepseek-v3")
@click.option("--checkpoint", metavar="DIR")
@click.option("--nodes", type=click.IntRange(1), default=2, show_default=True)
@click.option("--shards-per-node", type=click.IntRange(1), default=2, show_default=True)
@click.option("--minutes", type=click.FloatRange(0.1), default=30.0, show_default=True)
@click.option("--warm-up-minutes", type=click.FloatRange(0), default=5.0, show_default=True, help="Not judged.")
@click.option("--concurrency", type=click.IntRange(1), default=16, show_default=True)
@click.option("--input-len", type=click.IntRange(1), default=96, show_default=True, help="At most.")
@click.option("--output-len", type=click.IntRange(1), default=192, show_default=True, help="At most.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--output", metavar="FILE", help="Write the JSON here too.")
def bench_soak(**options: Any) -> None:
    """Memory of every process over a long run on several hosts; exit code 1 where it grows or a request fails."""
    from ep.bench.soak import SoakOptions, run, show
    from ep.terminal import Terminal

    terminal = Terminal()
    signal.signal(signal.SIGTERM, _interrupt)
    result = run(SoakOptions(**options), terminal)
    show(result, terminal.console)
    sys.exit(0 if result.is_flat else 1)


def _interrupt(*_: Any) -> None:
    """SIGTERM takes down what was started, as Ctrl-C does."""
    raise KeyboardInterrupt

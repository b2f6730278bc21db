"""`ep bench`: the parsers of its commands."""

from __future__ import annotations

import signal
import sys
from typing import Any

import click

from ep.options import FlagsForVllm, Listing, given


@click.group()
def bench() -> None:
    """Measurements, each beside a baseline of the same run: a table, then one line of JSON."""
    signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C does: the servers that were started end first


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


_MODEL = click.argument("model", default="deepseek-v3")
_SEED = click.option("--seed", type=int, default=0, show_default=True)


def _results(command: Any) -> Any:
    """--output and --page."""
    page = click.option("--page", metavar="DIR", help="Write a dated page with a plot into this folder.")
    return click.option("--output", metavar="FILE", help="Write the JSON here too.")(page(command))



@bench.command("serve", cls=FlagsForVllm)
@_MODEL
@click.option("--url", help="Measure this running server instead of starting one.")
@click.option("--against", type=click.Choice(["native"]), help="Measure native vLLM on the same weights in turns.")
@click.option("--checkpoint", metavar="DIR", help="The weights; with --url, the served model's tokenizer.")
@click.option("--concurrency", type=Listing(int), default=(), help="Requests in flight. [default: 16]")
@click.option("--request-rate", type=Listing(float), default=(), help="Requests sent in a second; inf: all at once.")
@click.option("--input-len", type=click.IntRange(1), default=32, show_default=True, help="Tokens of a random prompt.")
@click.option("--output-len", type=click.IntRange(1), help="[default: 128, or what --prompts says of each]")
@click.option("--prompts", metavar="FILE.jsonl", help='Lines of {"prompt": TEXT, "output_tokens": N}, sent as is.')
@click.option("--num-prompts", type=click.IntRange(1), help="[default: 4 for each in flight, or 64 at a rate]")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@_SEED
@click.option("--shards", type=click.IntRange(1), help="Shards of the server that is started.")
@click.option("--verbose", is_flag=True)
@_results
def bench_serve(shards: int | None, verbose: bool, **options: Any) -> None:
    """Throughput and latency of a server under vLLM's own benchmark client; vLLM flags follow `--`.

    A list for --concurrency or --request-rate is a sweep. With --request-rate, --concurrency is a bound. A running
    server that asks for a key gets EP_API_KEY.
    """
    from ep.bench.serve import ServeBenchOptions, run, show
    from ep.terminal import Terminal

    terminal = Terminal(verbose)
    flags = ("--shards", str(shards)) if shards is not None else ()
    show(run(ServeBenchOptions(ep_flags=flags, **given(options)), terminal), terminal.console)


@bench.command("decode-latency", cls=FlagsForVllm)
@_MODEL
@click.option("--against", type=click.Choice(["native"]), help="Measure native vLLM on the same weights in turns.")
@click.option("--checkpoint", metavar="DIR")
@click.option("--batch-size", type=click.IntRange(1), help="Requests that decode together. [default: 240; on CPUs 16]")
@click.option("--input-len", type=Listing(int), default="512,1024,2048", show_default=True, help="Tokens of a prompt.")
@click.option("--output-len", type=click.IntRange(2), help="Steps that are timed. [default: 200; on CPUs 64]")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--parts/--no-parts", default=None, help="Profile the router for a step's parts. [default: on CPUs]")
@_SEED
@click.option("--shards", type=click.IntRange(1), help="Shards of our server.")
@_results
def bench_decode_latency(shards: int | None, **options: Any) -> None:
    """How long a decode step takes, by the prompts' length, and what of it is attention, gate, dispatch, experts and
    combine; vLLM flags follow `--`."""
    from ep.bench.decode_latency import DecodeLatencyOptions, run, show
    from ep.terminal import Terminal

    terminal = Terminal()
    flags = ("--shards", str(shards)) if shards is not None else ()
    show(run(DecodeLatencyOptions(ep_flags=flags, **options), terminal), terminal.console)


@bench.command("rebalance")
@_MODEL
@click.option("--checkpoint", metavar="DIR")
@click.option("--shards", type=click.IntRange(2), default=4, show_default=True)
@click.option("--redundant", type=click.IntRange(0), default=0, show_default=True, help="Replicas in each layer.")
@click.option("--concurrency", type=click.IntRange(1), default=16, show_default=True)
@click.option("--num-prompts", type=click.IntRange(1), default=16, show_default=True)
@click.option("--input-len", type=click.IntRange(1), default=32, show_default=True)
@click.option("--output-len", type=click.IntRange(2), default=400, show_default=True)
@_SEED
@_results
def bench_rebalance(**options: Any) -> None:
    """What moving experts costs the streams that are being served, and what it gives them."""
    from ep.bench.rebalance import RebalanceBenchOptions, run, show
    from ep.terminal import Terminal

    terminal = Terminal()
    show(run(RebalanceBenchOptions(**options), terminal), terminal.console)


@bench.command("transport")
@click.option("--num-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--hidden-size", type=click.IntRange(1), default=7168, show_default=True)
@click.option("--shards", type=click.IntRange(1), multiple=True, default=(2, 4), show_default=True)
@click.option("--ways", multiple=True, default=("shm", "tcp", "gloo"), show_default=True)
@click.option("--iterations", type=click.IntRange(1), default=400, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@_results
def bench_transport(**options: Any) -> None:
    """Round trips without compute between real processes, over shared memory, TCP and gloo."""
    from ep.bench.transport import TransportBenchOptions, report, run

    report(run(TransportBenchOptions(**options)))


@bench.command("kernels")
@click.option("--model", default="deepseek-v3", show_default=True, help="A preset or a checkpoint's directory.")
@click.option("--slots", type=click.IntRange(1), default=32, show_default=True, help="Expert slots of the shard.")
@click.option(
    "--tokens",
    type=click.IntRange(1),
    multiple=True,
    help="Rows that reach the shard; may be repeated. [default: 1 to 16384]",
)
@click.option("--baselines/--no-baselines", default=True, show_default=True, help="vLLM and DeepGEMM where installed.")
@_results
def bench_kernels(**options: Any) -> None:
    """A shard's GPU kernels beside vLLM's and DeepGEMM's, and beside what the device can do."""
    from ep.bench.kernels import KernelBenchOptions, run

    run(KernelBenchOptions(**given(options)))


@bench.command("placement")
@click.option("--layers", type=click.IntRange(1), default=58, show_default=True, help="MoE layers.")
@click.option("--experts", type=click.IntRange(1), default=256, show_default=True)
@click.option("--loads", multiple=True, help="Kinds of load; may be repeated. [default: all]")
@click.option("--shards", type=click.IntRange(1), multiple=True, help="May be repeated. [default: 8 to 288]")
@click.option("--redundant", type=click.IntRange(0), multiple=True, help="Slots per layer. [default: 0, 32, 64]")
@click.option("--num-tokens", type=click.IntRange(1), default=256, show_default=True, help="Tokens of a batch.")
@click.option("--top-k", type=click.IntRange(1), default=8, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Times that each plan is made.")
@_SEED
@_results
def bench_placement(**options: Any) -> None:
    """Plans beside vLLM's policy and the bound, and how evenly the router spreads batches over replicas."""
    from ep.bench.placement import PlacementBenchOptions, report, run

    report(run(PlacementBenchOptions(**given(options))))


@bench.command("compare")
@click.argument("before", metavar="A.json")
@click.argument("after", metavar="B.json")
@click.option("--tolerance", type=click.FloatRange(0, 1, max_open=True), default=0.05, show_default=True)
@click.option("--only", metavar="TEXT", help="Only figures whose name contains this.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
def bench_compare(**options: Any) -> None:
    """Two results of one benchmark: B over A, figure by figure; exit code 1 where B is worse beyond the tolerance."""
    from rich.console import Console

    from ep.bench.compare import run

    sys.exit(run(**options, console=Console(highlight=False)))

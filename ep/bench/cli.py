"""`ep bench`: the parsers of its commands."""

from __future__ import annotations

import signal
import sys
from typing import Any

import click

from ep.options import TRANSPORTS, FlagsForVllm, Listing, Words, given


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


def _servers_flags(command: Any) -> Any:
    """--ep-flags and --native-flags."""
    ours = click.option(
        "--ep-flags", type=Words(), default=(), help="Further options of `ep serve`, as one word of the shell."
    )
    theirs = click.option(
        "--native-flags", type=Words(), default=(), help="Of native vLLM alone, such as its expert parallelism."
    )
    return ours(theirs(command))


@bench.command("serve", cls=FlagsForVllm)
@_MODEL
@click.option("--url", help="Measure this running server instead of starting one.")
@click.option("--against", type=click.Choice(["native"]), help="Measure native vLLM on the same weights in turns.")
@click.option(
    "--one-by-one", is_flag=True, help="Start native vLLM when ours has ended: for what the machine has room for once."
)
@click.option("--checkpoint", metavar="DIR", help="The weights; with --url, the served model's tokenizer.")
@click.option("--layers", type=click.IntRange(1), help="So many layers of the published shapes, with made-up weights.")
@click.option("--concurrency", type=Listing(int), default=(), help="Requests in flight. [default: 16]")
@click.option("--request-rate", type=Listing(float), default=(), help="Requests sent in a second; inf: all at once.")
@click.option("--input-len", type=click.IntRange(1), default=32, show_default=True, help="Tokens of a random prompt.")
@click.option("--output-len", type=click.IntRange(1), help="[default: 128, or what --prompts says of each]")
@click.option("--prompts", metavar="FILE.jsonl", help='Lines of {"prompt": TEXT, "output_tokens": N}, sent as is.')
@click.option("--num-prompts", type=click.IntRange(1), help="[default: 4 for each in flight, or 64 at a rate]")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@_SEED
@click.option("--shards", type=click.IntRange(1), help="Shards of the server that is started.")
@click.option("--routers", type=click.IntRange(1), help="Routers of the server that is started.")
@click.option("--transport", type=click.Choice(TRANSPORTS), help="Transport of the server that is started.")
@_servers_flags
@click.option("--verbose", is_flag=True)
@_results
def bench_serve(verbose: bool, **options: Any) -> None:
    """Throughput and latency of a server under vLLM's own benchmark client; vLLM flags follow `--`.

    A list for --concurrency or --request-rate is a sweep. With --request-rate, --concurrency is a bound. A running
    server that asks for a key gets EP_API_KEY. Ctrl-C, or a server that fails, leaves the rounds that all servers have
    ended: the result is marked incomplete then, with exit code 1.
    """
    from ep.bench.serve import ServeBenchOptions, run, show
    from ep.terminal import Terminal

    terminal = Terminal(verbose)
    of_server = {f"--{name}": options.pop(name) for name in ("shards", "routers", "transport")}
    flags = tuple(word for name, value in of_server.items() if value is not None for word in (name, str(value)))
    flags += options.pop("ep_flags")
    result = run(ServeBenchOptions(ep_flags=flags, **given(options)), terminal)
    show(result, terminal.console)
    sys.exit(0 if result.incomplete is None else 1)


@bench.command("decode-latency", cls=FlagsForVllm)
@_MODEL
@click.option("--against", type=click.Choice(["native"]), help="Measure native vLLM on the same weights in turns.")
@click.option("--checkpoint", metavar="DIR")
@click.option("--layers", type=click.IntRange(1), help="So many layers of the published shapes, with made-up weights.")
@click.option("--batch-size", type=click.IntRange(1), help="Requests that decode together. [default: 240; on CPUs 16]")
@click.option("--input-len", type=Listing(int), default="512,1024,2048", show_default=True, help="Tokens of a prompt.")
@click.option("--output-len", type=click.IntRange(2), help="Steps that are timed. [default: 200; on CPUs 64]")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--parts/--no-parts", default=None, help="Profile the router for a step's parts. [default: on CPUs]")
@_SEED
@click.option("--shards", type=click.IntRange(1), help="Shards of our server.")
@_servers_flags
@_results
def bench_decode_latency(shards: int | None, **options: Any) -> None:
    """How long a decode step takes, by the prompts' length, and what of it is attention, gate, dispatch, experts and
    combine; vLLM flags follow `--`."""
    from ep.bench.decode_latency import DecodeLatencyOptions, run, show
    from ep.terminal import Terminal

    terminal = Terminal()
    flags = ("--shards", str(shards)) if shards is not None else ()
    flags += options.pop("ep_flags")
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
@click.option(
    "--transport",
    type=click.Choice(["socket", "ipc"]),
    default="socket",
    show_default=True,
    help="socket: between processes, beside gloo. ipc: between GPUs, from within a captured graph, beside NCCL.",
)
@click.option(
    "--num-tokens", type=Listing(int), default=(), help="Tokens of a layer. [default: 128; ipc: 8,32,128,512]"
)
@click.option("--hidden-size", type=click.IntRange(1), default=7168, show_default=True)
@click.option("--shards", type=click.IntRange(1), multiple=True, help="May be repeated. [default: 2, 4; ipc: 1, 2]")
@click.option("--ways", multiple=True, help="Of socket. [default: shm, tcp, gloo]")
@click.option("--iterations", type=click.IntRange(1), help="Of socket: round trips in a round. [default: 400]")
@click.option("--layers", type=click.IntRange(1), help="Of ipc: round trips in the graph. [default: 58]")
@click.option("--rounds", type=click.IntRange(1), help="[default: 5; ipc: 20 replays of the graph]")
@_results
def bench_transport(transport: str, num_tokens: tuple[int, ...], **options: Any) -> None:
    """Round trips without compute: between processes over shared memory and TCP, or between GPUs."""
    chosen = {name: value for name, value in given(options).items() if value is not None}
    for name in ("ways", "iterations") if transport == "ipc" else ("layers",):
        if name in chosen:
            raise click.UsageError(f"--{name} is no option of --transport {transport}")
    if transport == "ipc":
        from ep.bench.ipc import run as run_ipc
        from ep.bench.ipc_result import IpcBenchOptions

        if num_tokens:
            chosen["tokens"] = num_tokens
        run_ipc(IpcBenchOptions(**chosen))
        return
    if len(num_tokens) > 1:
        raise click.UsageError("--num-tokens is a list, expected one number with --transport socket")
    from ep.bench.transport import TransportBenchOptions, report, run

    if num_tokens:
        chosen["num_tokens"] = num_tokens[0]
    report(run(TransportBenchOptions(**chosen)))


@bench.command("joining")
@_MODEL
@click.option("--routers", type=click.IntRange(2), help="A shard beside each. [default: one on each GPU]")
@click.option("--num-tokens", type=Listing(int), default=(), help="Of a router's step. [default: 16,64,128]")
@click.option("--layers", type=click.IntRange(1), default=2, show_default=True, help="MoE layers of a step.")
@click.option("--between-us", type=click.FloatRange(0), default=250.0, show_default=True, help="From one to the next.")
@click.option("--rest-us", type=click.FloatRange(0), default=2100.0, show_default=True, help="Of the rest of a step.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True)
@click.option("--stall-ms", type=click.FloatRange(0), default=20.0, show_default=True, help="Of a router's host.")
@click.option("--stall-every", type=click.IntRange(1), default=60, show_default=True, help="Steps, on average.")
@_SEED
@_results
def bench_joining(**options: Any) -> None:
    """Routers that decode on GPUs with a shard beside each: a step's time, in step and not; needs no vLLM."""
    from ep.bench.joining import JoiningOptions, run

    run(JoiningOptions(**given(options)))


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


@bench.command("nodes")
@_MODEL
@click.option("--checkpoint", metavar="DIR")
@click.option("--nodes", type=Listing(int), default=(1, 2, 4), help="Numbers of nodes. [default: 1,2,4]")
@click.option("--shards-per-node", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--address", metavar="HOST:PORT|auto", help="A running Ray cluster. [default: hosts are made on this machine]"
)
@click.option("--concurrency", type=click.IntRange(1), default=16, show_default=True)
@click.option("--input-len", type=click.IntRange(1), default=32, show_default=True)
@click.option("--output-len", type=click.IntRange(2), default=64, show_default=True)
@click.option("--num-prompts", type=click.IntRange(1), default=64, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--slow-host", type=click.IntRange(0), metavar="N", help="Whose link is slowed. [default: the last]")
@click.option("--delay-ms", type=click.FloatRange(0), default=0.0, show_default=True, help="Of that link, one way.")
@click.option(
    "--loss", type=click.FloatRange(0, 1, max_open=True), default=0.0, show_default=True, help="Share of its packets."
)
@click.option("--rate-mbit", type=click.FloatRange(0, min_open=True), help="Of that link. [default: no limit]")
@click.option(
    "--lose-host-after",
    "lose_host_after_s",
    type=click.FloatRange(0),
    metavar="S",
    help="Cut the last host off so many seconds into the last measurement.",
)
@_SEED
@_results
def bench_nodes(**options: Any) -> None:
    """The same load on 1, 2 and 4 nodes: throughput, every link's round trips and bytes, and whether the tokens are the
    same. Exit code 1 where it could not be measured to the end."""
    from ep.bench.nodes import NodesBenchOptions, run
    from ep.bench.nodes_report import describe
    from ep.bench.result import publish
    from ep.terminal import Terminal

    terminal = Terminal()
    result = run(NodesBenchOptions(**options), terminal)
    publish("nodes", result, describe(result), terminal.console)
    sys.exit(0 if result.incomplete is None else 1)


@bench.command("soak")
@_MODEL
@click.option("--checkpoint", metavar="DIR")
@click.option("--nodes", type=click.IntRange(1), default=2, show_default=True)
@click.option("--shards-per-node", type=click.IntRange(1), default=2, show_default=True)
@click.option("--minutes", type=click.FloatRange(0.1), default=30.0, show_default=True)
@click.option("--warm-up-minutes", type=click.FloatRange(0), default=10.0, show_default=True, help="Not judged.")
@click.option("--concurrency", type=click.IntRange(1), default=16, show_default=True)
@click.option("--input-len", type=click.IntRange(1), default=96, show_default=True, help="At most.")
@click.option("--output-len", type=click.IntRange(1), default=192, show_default=True, help="At most.")
@_SEED
@_results
def bench_soak(**options: Any) -> None:
    """Memory of every process over a long run on several hosts; exit code 1 where it grows or a request fails."""
    from ep.bench.result import publish
    from ep.bench.soak import SoakOptions, run
    from ep.bench.soak_report import describe
    from ep.terminal import Terminal

    terminal = Terminal()
    result = run(SoakOptions(**options), terminal)
    publish("soak", result, describe(result), terminal.console)
    sys.exit(0 if result.is_flat else 1)

"""The `ep` command: parse, call, exit code."""

from __future__ import annotations

import sys
from typing import Any

import click

from ep import __version__
from ep.bench.cli import bench
from ep.errors import EpError
from ep.explain.cli import explain
from ep.options import TRANSPORTS, FlagsForVllm, given


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Expert-parallel serving of Mixture-of-Experts models on Ray."""


@cli.command(cls=FlagsForVllm)
@click.argument("model")
@click.option("--checkpoint", metavar="DIR", help="Hugging Face checkpoint to serve.")
@click.option("--synthetic", is_flag=True, help="Serve the small stand-in with made-up weights.")
@click.option(
    "--layers",
    type=click.IntRange(1),
    help="With --synthetic: so many layers of the published shapes; their weights are made where they are held.",
)
@click.option(
    "--shards",
    type=click.IntRange(1),
    help="Shards that the experts are split over. [default: one a GPU of the cluster; up to 2 without]",
)
@click.option("--nodes", type=click.IntRange(1), help="Nodes of the cluster to spread them over. [default: all]")
@click.option("--address", metavar="HOST:PORT|auto|local", help="Ray cluster to join. [default: auto, else local]")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option(
    "--transport",
    type=click.Choice(TRANSPORTS),
    default="auto",
    show_default=True,
    help="socket: to shards on any host. ipc: through memory that routers and shards of one host share, between GPUs "
    "without a host in the way, to other hosts by sockets. local: all slots in the router's process. auto: ipc where "
    "attention runs on GPUs, else socket.",
)
@click.option(
    "--share-gpus/--no-share-gpus",
    default=None,
    help="With ipc, shards that live in routers' processes, on their GPUs. [default: where there are too few GPUs]",
)
@click.option(
    "--dispatch-dtype",
    type=click.Choice(["bf16", "fp8"]),
    default="bf16",
    show_default=True,
    help="How tokens travel to the shards.",
)
@click.option(
    "--combine-dtype",
    type=click.Choice(["f32", "bf16"]),
    default="f32",
    show_default=True,
    help="How partial sums travel back.",
)
@click.option(
    "--expert-dtype",
    type=click.Choice(["auto", "fp8"]),
    default="auto",
    show_default=True,
    help="auto: FP8 experts stay FP8 on GPUs and become bf16 on CPUs, as in native vLLM. fp8: stay FP8 there too, in "
    "half the memory.",
)
@click.option(
    "--deadline",
    "deadline_s",
    type=click.FloatRange(0.1),
    default=60.0,
    show_default=True,
    help="Seconds that a layer may wait for its shards, a restart included.",
)
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="Seconds to wait for free resources in the cluster.",
)
@click.option(
    "--shard-cpus", type=click.FloatRange(0), default=1.0, show_default=True, help="CPUs each shard reserves."
)
@click.option("--shard-threads", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--shard-gpus",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="GPUs each shard reserves where vLLM computes on GPUs; below 1 several actors share one, and its time.",
)
@click.option(
    "--router-gpus",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="The same for each router.",
)
@click.option(
    "--routers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Engines behind the server, each with attention and KV cache of its own, on the same shards.",
)
@click.option("--router-threads", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--redundant", type=click.IntRange(0), default=0, show_default=True, help="Replicas of experts in each layer."
)
@click.option(
    "--spare-slots",
    type=click.IntRange(0),
    help="Empty slots per shard and layer, which rebalancing moves experts into. [default: one for every 16]",
)
@click.option(
    "--auto-rebalance/--no-auto-rebalance", default=True, show_default=True, help="Move experts where that pays back."
)
@click.option("--rebalance-interval", "rebalance_interval_s", type=click.FloatRange(1), default=60.0, show_default=True)
@click.option("--trace", metavar="PATH|none", help="New file to record load in. [default: a file in the state folder]")
@click.option(
    "--trace-window",
    "trace_window_s",
    type=click.FloatRange(0.1),
    default=10.0,
    show_default=True,
    help="Seconds that the trace adds up into one record.",
)
@click.option("--api-key", envvar="EP_API_KEY", help="Key that clients must send. [env: EP_API_KEY]")
@click.option("--check", is_flag=True, help="Stop as soon as a first token has come back.")
@click.option("--verbose", is_flag=True, help="Library logs on the terminal instead of in a file.")
def serve(**options: Any) -> None:
    """Serve MODEL (a preset or a checkpoint's directory) with an OpenAI API; vLLM flags follow `--`."""
    from ep.serve import serve as run
    from ep.serve_options import ServeOptions

    run(ServeOptions(**options))


cli.add_command(explain)
_ADDRESS = click.option("--address", default="auto", show_default=True, metavar="HOST:PORT|auto")


@cli.command()
@_ADDRESS
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of tables.")
def status(address: str, as_json: bool) -> None:
    """What runs on a cluster: shards, nodes, slots, memory, requests, tokens."""
    from ep.status import collect, show

    show(collect(address), as_json)


@cli.command()
@_ADDRESS
@click.option("--instance", metavar="NAME", help="Which instance, where several run (`ep status` names them).")
@click.option("--now", is_flag=True, help="Move also where it does not pay back.")
@click.option("--auto/--no-auto", default=None, help="Turn automatic rebalancing on or off, and do nothing else.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of text.")
def rebalance(**options: Any) -> None:
    """Level the shards by the load that was seen: plan, weigh gain against cost, move experts while serving."""
    from ep.rebalance import RebalanceCommand, run

    sys.exit(run(RebalanceCommand(**options)))


@cli.command()
@click.argument("trace", required=False)
@click.option("--live", is_flag=True, help="Of what a running instance has recorded so far.")
@click.option("--address", default="auto", show_default=True, metavar="HOST:PORT|auto", help="With --live.")
@click.option("--instance", metavar="NAME", help="With --live: which instance, where several run.")
@click.option("--compare", nargs=2, metavar="A B", help="Two traces side by side.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of tables.")
@click.option("--html", metavar="FILE", help="Where the page goes. [default: beside the trace]")
@click.option("--no-html", is_flag=True, help="No page.")
@click.option("--top", type=click.IntRange(1), default=20, show_default=True, help="Hottest experts to list.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of what is sampled.")
def report(
    trace: str | None,
    live: bool,
    address: str,
    instance: str | None,
    compare: tuple[str, str] | None,
    as_json: bool,
    html: str | None,
    no_html: bool,
    top: int,
    seed: int,
) -> None:
    """Where the experts' load went, and what could level it: tables, one offline HTML page, JSON."""
    if (trace is not None) + (compare is not None) + live != 1:
        raise click.UsageError("give one TRACE, or --live, or --compare with two")
    if html is not None and no_html:
        raise click.UsageError("--html and --no-html exclude each other")
    from ep.report.command import ReportOptions, ReportOutput, compare_files, report_file
    from ep.report.command import report as report_trace

    options, output = ReportOptions(top, seed), ReportOutput(as_json, html, not no_html)
    if compare is not None:
        compare_files(compare, options, output)
    elif trace is not None:
        report_file(trace, options, output)
    else:
        from ep.live import collect_live

        report_trace(collect_live(address, instance), options, output)


@cli.group()
def model() -> None:
    """Checkpoints and presets."""


@model.command("synth")
@click.argument("preset")
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--seed", type=int, help="[default: the preset's]")
@click.option(
    "--zipf", "zipf_exponent", type=click.FloatRange(0), help="Skew of expert popularity. [default: the preset's]"
)
@click.option("--bf16", is_flag=True, help="Dequantised, for engines without block FP8.")
@click.option(
    "--layers",
    type=click.IntRange(1),
    help="So many layers of the published shapes, without weights: they are made where they are held.",
)
def synth(
    preset: str, folder: str, seed: int | None, zipf_exponent: float | None, bf16: bool, layers: int | None
) -> None:
    """Write the synthetic stand-in of PRESET into FOLDER."""
    from ep.synth import SynthOptions
    from ep.synth import synth as run

    run(SynthOptions(preset, folder, seed, zipf_exponent, bf16, layers))


@model.command("list")
def list_models() -> None:
    """The presets that `ep serve` knows."""
    from ep.presets import list_presets

    for name in list_presets():
        click.echo(name)


@cli.command("tune")
@click.argument("model")
@click.option(
    "--shards",
    type=click.IntRange(1),
    multiple=True,
    help="Tune for the slots of one of so many shards; may be repeated. [default: the usual numbers of slots]",
)
@click.option(
    "--tokens", type=click.IntRange(1), multiple=True, help="Rows that reach the shard. [default: 1 to 16384]"
)
@click.option("--folder", default="tuned", show_default=True, metavar="DIR", help="Where the files and journals go.")
def tune(**options: Any) -> None:
    """Measure the best kernel tiles for MODEL's experts on this machine's GPUs; an interrupted run goes on."""
    from ep.tune import TuneOptions, run

    run(TuneOptions(**given(options)))


cli.add_command(bench)


def main() -> None:
    """Entry point: user mistakes are one line and exit code 2."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        click.echo(f"ep: {error.format_message()}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except EpError as error:
        print(f"ep: {error}", file=sys.stderr)  # click writes bytes, which vLLM's log prefix does not take
        sys.exit(error.exit_code)

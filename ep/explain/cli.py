"""The options of `ep explain`."""

from __future__ import annotations

from typing import Any

import click


@click.command()
@click.argument("model")
@click.option("--checkpoint", metavar="DIR", help="Read config.json there and compare every stored tensor with it.")
@click.option("--device", metavar="NAME", help="mi300x, mi308x or h200. [default: what this machine has, else mi300x]")
@click.option("--input-len", type=click.IntRange(1), default=1024, show_default=True, help="Tokens of a prompt.")
@click.option("--output-len", type=click.IntRange(1), default=128, show_default=True, help="Tokens of an answer.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Requests at once.")
@click.option(
    "--shards", type=click.IntRange(1), help="[default: the largest power of two that leaves the router a GPU]"
)
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True)
@click.option("--redundant", type=click.IntRange(0), default=0, show_default=True, help="As of `ep serve`.")
@click.option("--spare-slots", type=click.IntRange(0), help="As of `ep serve`. [default: one for every 16]")
@click.option("--max-model-len", type=click.IntRange(1), help="As of vLLM. [default: what the config gives]")
@click.option("--kv-cache-dtype", type=click.Choice(["auto", "bf16", "fp8"]), default="auto", show_default=True)
@click.option("--dispatch-dtype", type=click.Choice(["bf16", "fp8"]), default="bf16", show_default=True)
@click.option(
    "--max-seq-len-to-capture",
    "captured_len",
    type=click.IntRange(1),
    help="Of vLLM's older engine, whose own default is 8192. [default: input + output]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of tables.")
def explain(**options: Any) -> None:
    """What serving MODEL (a preset or a checkpoint's directory) takes and what to expect, before anything starts."""
    from ep.explain.command import ExplainOptions, run

    run(ExplainOptions(**options))

"""Where captured graphs of vLLM's models end, from the flags as vLLM parses them."""

from __future__ import annotations

import argparse

import pytest

from ep.engine.ops import SPLITTING_OPS
from ep.engine.server import parse_flags, split_at_experts
from ep.errors import OptionError

ATTENTION = "vllm::unified_attention_with_output"


def parsed(mode: str | None) -> argparse.Namespace:
    chosen = () if mode is None else ("--compilation-config", f'{{"cudagraph_mode": "{mode}"}}')
    return parse_flags(("--model", "any", *chosen))


def mode_of(args: argparse.Namespace) -> str | None:
    mode = args.compilation_config.cudagraph_mode
    return None if mode is None else mode.name


@pytest.mark.parametrize("mode", [None, "PIECEWISE", "NONE"])
def test_a_host_in_every_layer_ends_every_graph(mode: str | None) -> None:
    args = parsed(mode)
    split_at_experts(args, whole_steps=False)
    assert {*SPLITTING_OPS, ATTENTION} <= set(args.compilation_config.splitting_ops)
    assert mode_of(args) == (mode or "PIECEWISE")


@pytest.mark.parametrize("mode", ["FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"])
def test_whole_steps_cannot_have_a_host_in_every_layer(mode: str) -> None:
    with pytest.raises(OptionError, match=f"{mode}: --transport socket needs PIECEWISE or NONE"):
        split_at_experts(parsed(mode), whole_steps=False)


@pytest.mark.parametrize("mode", [None, "PIECEWISE", "FULL_AND_PIECEWISE"])
def test_parts_of_steps_end_at_the_experts_beside_graphs_of_whole_steps(mode: str | None) -> None:
    args = parsed(mode)
    split_at_experts(args, whole_steps=True)
    assert {*SPLITTING_OPS, ATTENTION} <= set(args.compilation_config.splitting_ops)
    assert mode_of(args) == mode


@pytest.mark.parametrize("mode", ["FULL", "FULL_DECODE_ONLY", "NONE"])
def test_where_there_are_no_graphs_of_parts_nothing_changes(mode: str) -> None:
    args = parsed(mode)
    split_at_experts(args, whole_steps=True)
    assert args.compilation_config.splitting_ops is None and mode_of(args) == mode

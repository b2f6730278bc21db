"""Weights that are made: native vLLM and ep make the same ones, each by itself."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ep.made_slice import write_made
from ep.plugin import NATIVE_LOAD_FORMAT
from ep.presets import load_preset
from tests.serving.generate import NUM_TOKENS, Case, native, routed

pytestmark = pytest.mark.long

NUM_PROMPTS = 16
TIE = 0.05
"""A few steps of bf16 at the size of the logits."""
MAX_PARTED = 4
"""Random weights are nearly indifferent more often than a trained model or the stand-in."""


def test_greedy_tokens_equal_native_on_weights_that_each_makes(tmp_path: Path) -> None:
    config = {**load_preset("deepseek-v3").synthetic_config, "num_hidden_layers": 2, "n_routed_experts": 64}
    write_made(config, tmp_path / "made", seed=0)
    pick = random.Random(0)
    prompts = [[pick.randrange(16, 256) for _ in range(pick.randint(4, 40))] for _ in range(NUM_PROMPTS)]
    bf16 = {"load_format": NATIVE_LOAD_FORMAT, "hf_overrides": {"quantization_config": None}}
    wanted = native(tmp_path / "made", prompts, **bf16, enforce_eager=True)
    (found,) = routed(tmp_path / "made", prompts, [Case(2, "local")], tmp_path, enforce_eager=True)
    assert len({tuple(w.tokens) for w in wanted}) == NUM_PROMPTS, "the model says the same to every prompt"
    parted = [
        next(gap for token, other, gap in zip(tokens, want.tokens, want.gaps) if token != other)
        for tokens, want in zip(found, wanted, strict=True)
        if tokens != want.tokens
    ]
    assert all(len(tokens) == NUM_TOKENS for tokens in found)
    assert len(parted) <= MAX_PARTED and all(gap < TIE for gap in parted), parted

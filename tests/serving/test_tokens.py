"""Greedy tokens with experts on shards against native vLLM's on the same dequantised weights."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ep.checkpoint import write_dequantized
from ep.kernels.cpu_moe import choose
from ep.presets import load_preset
from ep.synthetic import cached_checkpoint
from tests.serving.generate import NUM_TOKENS, Case, native, routed

NUM_PROMPTS = 32
TIE = 0.02
"""A difference of log probabilities that rounding may turn around."""
MAX_TIES = 0.02
MAX_ROUNDED = 2
"""Of the prompts, where the CPU has only the op that rounds every expert's row to bf16, and native rounds their sum: a
gate that is as good as tied may pick another expert then, and does so however the shards are reached."""
CASES = [Case(1, "local"), Case(4, "unix"), Case(2, "ipc")]
FURTHER_CASES = [
    Case(2, "tcp"),
    Case(2, "unix", num_alone=8),
    Case(2, "local"),
    Case(4, "local"),
    Case(1, "unix"),
    Case(4, "tcp"),
    Case(4, "ipc"),
]
FEW_CASES = [Case(1, "local"), Case(2, "ipc")]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("preset_name", "cases", "is_eager"),
    [
        ("deepseek-v3", CASES, False),
        ("mixtral-8x7b", FEW_CASES, True),
        pytest.param("deepseek-v3", FURTHER_CASES, False, marks=pytest.mark.long),
        pytest.param("mixtral-8x7b", [*CASES, *FURTHER_CASES], False, marks=pytest.mark.long),
    ],
    ids=["deepseek-v3", "mixtral-8x7b", "deepseek-v3 further", "mixtral-8x7b all"],
)
def test_greedy_tokens_equal_native(preset_name: str, cases: list[Case], is_eager: bool, tmp_path: Path) -> None:
    checkpoint = cached_checkpoint(load_preset(preset_name))
    write_dequantized(checkpoint, tmp_path / "bf16")
    prompts = _prompts()
    with ThreadPoolExecutor() as pool:
        theirs = pool.submit(native, tmp_path / "bf16", prompts, enforce_eager=is_eager)
        found = routed(checkpoint, prompts, cases, tmp_path, enforce_eager=is_eager)
        wanted = theirs.result()
    assert len({tuple(w.tokens) for w in wanted}) == NUM_PROMPTS, "the model says the same to every prompt"
    num_ties = 0
    rounded: dict[tuple[int, int], list[int]] = {}
    for case, tokens_of_prompt in zip(cases, found, strict=True):
        assert len(tokens_of_prompt) == (case.num_alone or NUM_PROMPTS)
        for prompt_idx, (tokens, want) in enumerate(zip(tokens_of_prompt, wanted)):
            assert len(tokens) == NUM_TOKENS
            first = next((i for i, pair in enumerate(zip(tokens, want.tokens)) if pair[0] != pair[1]), None)
            if first is not None and want.gaps[first] < TIE:
                num_ties += 1
            elif first is not None:
                assert case.num_shards > 1, f"{case}, prompt {prompt_idx}: no tie at token {first}"
                same = rounded.setdefault((case.num_shards, prompt_idx), tokens)
                assert tokens == same, f"{case}, prompt {prompt_idx}: no tie at token {first}, by chance"
    parted = {prompt_idx for _, prompt_idx in rounded}
    assert len(parted) <= _most_rounded(preset_name), f"prompts {sorted(parted)} part without a tie"
    num_pairs = sum(map(len, found))
    assert num_ties <= MAX_TIES * num_pairs, f"{num_ties} of {num_pairs} continuations part at a tie"


def _most_rounded(preset_name: str) -> int:
    spec = load_preset(preset_name).synthetic_spec
    dims = spec.hidden_size, spec.moe_intermediate_size, spec.quant_block
    return MAX_ROUNDED if choose(torch.bfloat16, *dims).path == "vllm" else 0


def _prompts() -> list[list[int]]:
    """Random text of 4 to 40 tokens; the stand-ins' vocabularies start with special tokens."""
    pick = random.Random(0)
    return [[pick.randrange(16, 256) for _ in range(pick.randint(4, 40))] for _ in range(NUM_PROMPTS)]

"""Stand-ins: real format, reproducible bits, text that rounding leaves alone and a missing expert does not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep.checkpoint import INDEX_FILE, Checkpoint, write_dequantized
from ep.errors import ModelError
from ep.kernels.reference import gating
from ep.model import ModelSpec
from ep.presets import load_preset
from ep.synthetic import cached_checkpoint, write_checkpoint
from ep.synthetic_weights import CHARACTERS, Weights
from tests.cases import small_checkpoint, small_config

NAMES = ("deepseek-v3", "mixtral-8x7b")
NUM_PROMPTS, PROMPT_LENGTH, NUM_TOKENS = 16, 16, 64


@dataclass(frozen=True)
class StandIn:
    path: Path
    model: Any
    tokenizer: Any
    spec: ModelSpec
    sequences: torch.Tensor
    """Prompts and their greedy continuations, int64 [NUM_PROMPTS, PROMPT_LENGTH + NUM_TOKENS]."""


@pytest.fixture(scope="module", params=NAMES)
def stand_in(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """A preset's stand-in in transformers, in bf16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    preset = load_preset(request.param)
    path = tmp_path_factory.mktemp("fp8")
    write_checkpoint(preset.synthetic_config, path, preset.seed, preset.zipf_exponent)
    bf16 = tmp_path_factory.mktemp("bf16")
    write_dequantized(path, bf16)
    model, info = AutoModelForCausalLM.from_pretrained(bf16, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    torch.manual_seed(0)
    prompts = torch.randint(16, 256, (NUM_PROMPTS, PROMPT_LENGTH))
    sequences = model.generate(prompts, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0)
    yield StandIn(path, model, AutoTokenizer.from_pretrained(path), preset.synthetic_spec, sequences)


def next_tokens(stand_in: StandIn, sequences: torch.Tensor | None = None) -> torch.Tensor:
    """What the model would say at each place of its continuations, all places at once: [NUM_PROMPTS, NUM_TOKENS]."""
    with torch.no_grad():
        logits = stand_in.model(stand_in.sequences if sequences is None else sequences).logits
    return logits[:, PROMPT_LENGTH - 1 : -1].argmax(dim=-1)


Change = Callable[[Callable[..., torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(experts, hidden, topk_ids, topk_weights) -> the routed sum that takes the place of the right one."""


def share_changed(stand_in: StandIn, change: Change, monkeypatch: pytest.MonkeyPatch) -> float:
    """The share of prompts whose continuation another routed sum changes somewhere."""
    wanted = next_tokens(stand_in)
    for layer_idx in stand_in.spec.moe_layers:
        experts = stand_in.model.model.layers[layer_idx].mlp.experts
        right = experts.forward
        monkeypatch.setattr(experts, "forward", lambda *args, right=right: change(right, *args))
    return (next_tokens(stand_in) != wanted).any(dim=1).float().mean().item()


def num_experts(experts: Any) -> int:
    return int(experts.__self__.num_experts)


def in_partials(num_shards: int) -> Change:
    """Each shard's partial rounded to bf16 before they are summed."""

    def change(experts, hidden, ids, weights):  # type: ignore[no-untyped-def]
        shard = ids * num_shards // num_experts(experts)
        partials = [experts(hidden, ids, weights * (shard == s)).float() for s in range(num_shards)]
        return torch.stack(partials).sum(dim=0).to(hidden.dtype)

    return change


def one_replaced(experts, hidden, ids, weights):  # type: ignore[no-untyped-def]
    """One random choice of each token goes to a random expert."""
    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(0, ids.shape[1], (len(ids), 1), generator=generator)
    other = torch.randint(0, num_experts(experts), (len(ids), 1), generator=generator)
    return experts(hidden, ids.scatter(1, choice, other), weights)


def one_dropped(experts, hidden, ids, weights):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(0, ids.shape[1], (len(ids), 1), generator=generator)
    return experts(hidden, ids, weights.scatter(1, choice, 0))


@pytest.mark.parametrize("num_shards", [2, 4])
def test_rounding_of_partials_changes_no_text(
    stand_in: StandIn, num_shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert share_changed(stand_in, in_partials(num_shards), monkeypatch) == 0


@pytest.mark.parametrize("change", [lambda experts, hidden, ids, weights: hidden * 0, one_replaced, one_dropped])
def test_missing_and_wrong_experts_change_the_text(
    stand_in: StandIn, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert share_changed(stand_in, change, monkeypatch) >= 0.95


def test_the_past_matters(stand_in: StandIn) -> None:
    """The same last half of the prompt and continuation after another prompt's first half."""
    other = stand_in.sequences.clone()
    other[:, : PROMPT_LENGTH // 2] = other[:, : PROMPT_LENGTH // 2].roll(1, dims=0)
    assert (next_tokens(stand_in, other) != next_tokens(stand_in)).any(dim=1).float().mean() >= 0.95


def test_text_is_varied_and_does_not_end(stand_in: StandIn) -> None:
    text = stand_in.sequences[:, PROMPT_LENGTH:]
    assert len({tuple(row.tolist()) for row in text}) == NUM_PROMPTS
    assert (text[:, 1:] == text[:, :-1]).float().mean() < 0.05
    assert np.mean([len(row.unique()) for row in text]) > 24
    assert text.min() >= 259, "a special token or a lone byte in greedy text"
    decoded = stand_in.tokenizer.decode(text[0])
    assert decoded.replace(" ", "").isalpha() and decoded.isascii()


def test_confidence_is_a_language_models(stand_in: StandIn) -> None:
    with torch.no_grad():
        logits = stand_in.model(stand_in.sequences).logits[:, PROMPT_LENGTH - 1 : -1].float()
    best = logits.softmax(dim=-1).max(dim=-1).values
    assert 0.3 < best.median() < 1 and ((best > 0.1) & (best < 0.99)).float().mean() > 0.1


@settings(max_examples=30)
@given(text=st.text())
def test_any_text_round_trips(stand_in: StandIn, text: str) -> None:
    ids = stand_in.tokenizer(text)["input_ids"]
    assert ids[0] == stand_in.tokenizer.bos_token_id and max(ids) < stand_in.spec.vocab_size
    specials = stand_in.tokenizer.all_special_tokens
    if not any(special in text for special in specials):
        assert stand_in.tokenizer.decode(ids[1:]) == text


def test_chat_template(stand_in: StandIn) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi there"},
        {"role": "assistant", "content": "lo"},
        {"role": "user", "content": "again"},
    ]
    text = stand_in.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.count(stand_in.tokenizer.bos_token) == text.count(stand_in.tokenizer.eos_token) == 1
    places = [text.index(message["content"]) for message in messages]
    assert places == sorted(places)


def test_format_is_the_real_one(stand_in: StandIn) -> None:
    checkpoint = Checkpoint(stand_in.path)
    checkpoint.check()
    names = set(checkpoint.tensor_names())
    quantised = {name for name in names if checkpoint.read_tensor(name).dtype == torch.float8_e4m3fn}
    assert {name.removesuffix("_scale_inv") for name in names if name.endswith("_scale_inv")} == quantised
    plain = {name for name in names - quantised if not name.endswith("_scale_inv")}
    if stand_in.spec.quant_block is None:
        assert not quantised
    else:
        kinds = ("layernorm.weight", "norm.weight", "embed_tokens.weight", "lm_head.weight", ".gate.weight", "_bias")
        assert all(name.endswith(kinds) for name in plain)
        assert "model.layers.0.self_attn.kv_a_proj_with_mqa.weight" in quantised
        assert "model.layers.1.mlp.shared_experts.down_proj.weight" in quantised
    assert {checkpoint.read_tensor(n).dtype for n in plain if not n.endswith("_bias")} == {torch.bfloat16}
    index = json.loads((stand_in.path / INDEX_FILE).read_text())
    assert len(set(index["weight_map"].values())) == stand_in.spec.num_layers + 1
    stored = [checkpoint.read_tensor(name) for name in names]
    assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.itemsize for tensor in stored)


def digest(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, dtype="<f4").tobytes()).hexdigest()[:16]


def test_weights_depend_on_seed_and_name_alone() -> None:
    name = "model.layers.1.mlp.experts.5.up_proj.weight"

    def up(seed: int, zipf_exponent: float, **changes: Any) -> np.ndarray[Any, Any]:
        spec = ModelSpec.from_config(small_config("deepseek_v3", **changes), "small")
        return dict(Weights(spec, seed, zipf_exponent, CHARACTERS["deepseek_v3"]).layer(1))[name]

    # Pinned: the same bits on every machine and with every version of every library.
    assert digest(up(0, 0.6)) == "6f4fb4c429cd6494"
    assert np.array_equal(up(0, 0.6), up(0, 1.2, n_routed_experts=8))
    assert not np.array_equal(up(0, 0.6), up(1, 0.6))


def measured_slope(name: str, exponent: float) -> float:
    """The fitted exponent of popularity: log(choices) over log(rank) of the experts' intended ranks."""
    spec = load_preset(name).synthetic_spec
    layer_idx = spec.moe_layers[-1]
    weights = Weights(spec, 0, exponent, CHARACTERS[spec.family])
    hidden = torch.from_numpy(dict(weights.outer())["model.embed_tokens.weight"])
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(dim=-1, keepdim=True))
    gate, tensors = spec.gate_tensors(layer_idx), dict(weights.layer(layer_idx))
    bias = None if gate.bias is None else torch.from_numpy(tensors[gate.bias.name])
    ids = gating(hidden, torch.from_numpy(tensors[gate.weight.name]), bias, spec).topk_ids
    counts = np.bincount(ids.flatten().numpy(), minlength=spec.num_experts)
    ranks = weights.popularity_ranks(layer_idx)
    assert sorted(ranks) == list(range(spec.num_experts))
    return float(np.polyfit(np.log(ranks + 1), np.log(counts + 0.5), 1)[0])


@pytest.mark.parametrize("name", NAMES)
def test_popularity_follows_the_zipf_exponent(name: str) -> None:
    slopes = [measured_slope(name, exponent) for exponent in (0.0, 0.6, 1.2)]
    assert slopes == pytest.approx([0.0, -0.6, -1.2], abs=0.3)
    assert sorted(slopes, reverse=True) == slopes


def made_in_cache(cache: str) -> tuple[str, bytes]:
    import os

    os.environ["XDG_CACHE_HOME"] = cache
    path = cached_checkpoint(load_preset("mixtral-8x7b"))
    return str(path), (path / "model-00001-of-00005.safetensors").read_bytes()


def test_processes_that_ask_at_once_get_one_whole_checkpoint(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(made_in_cache, [str(tmp_path)] * 3))
    assert len(set(found)) == 1
    assert [str(path) for path in (tmp_path / "ep").iterdir()] == [found[0][0]]
    Checkpoint(found[0][0]).check()


def test_cache_key_includes_every_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    preset = load_preset("mixtral-8x7b")
    first = cached_checkpoint(preset)
    before = first.stat().st_mtime_ns
    assert cached_checkpoint(preset, seed=preset.seed) == first and first.stat().st_mtime_ns == before
    others = {cached_checkpoint(preset, seed=1), cached_checkpoint(preset, zipf_exponent=1.5)}
    assert len(others | {first}) == 3


def test_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_checkpoint(load_preset("mixtral-8x7b"), on_progress=interrupt)
    assert not list((tmp_path / "ep").iterdir())


def test_progress_counts_experts(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    write_checkpoint(small_config("deepseek_v3"), tmp_path, 0, 0.6, lambda *step: steps.append(step))
    assert steps == [(0, 16), (16, 16), (16, 16)]


def test_vocabulary_that_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="vocab_size is 300, expected 4"):
        small_checkpoint(tmp_path, "mixtral", small_config("mixtral", vocab_size=300))

"""Writes a small checkpoint of a preset's architecture and file format, whose greedy text is decisive.

Shape legend: H hidden, E experts, V vocabulary, C classes.

Every tensor is a pure function of (seed, tensor name), so of seed, layer, expert and matrix: random bits come from a
Philox stream keyed by a hash of both and do not depend on order or library versions.

A plain random model is nearly indifferent between its best tokens, so that rounding alone changes what it says; a
trained model is not. This one gets its confidence from where things lie in the residual stream:

- "class" coordinates hold the token's class, one of C orthogonal codes. An expert's hidden units are keyed to classes.
- "state" coordinates hold a random code of the token and what attention and the dense layers add: the context. The
  gates read them, so the context chooses the experts.
- "vote" coordinates hold what experts write. A unit that its class wakes votes for one vocabulary token, with a gain
  out of a few widely spaced rungs; (class, rung) decides the token. The highest rung among the chosen experts wins, by
  a margin: experts on one rung agree, and rungs lie far apart. lm_head reads the votes.
- one constant coordinate lets a row have an offset.

So rounding in the experts' sums reaches gates and attention only weakly and rarely changes the winning vote, while a
missing or wrong expert takes its votes with it. Every matrix has a small random part in all of its coordinates.
Experts are popular by Zipf's law, through the gate's bias (deepseek_v3) or its offset (mixtral).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from ep.checkpoint import write_index
from ep.errors import ModelError
from ep.model import ModelSpec, Preset

FORMAT_VERSION = 1
"""Part of the cache key: raise it when the same parameters give another checkpoint."""

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
OnProgress = Callable[[int, int], None]
"""Called with (experts done, experts in all)."""


@dataclass(frozen=True)
class Character:
    """What decides the stand-in's text. Strengths are standard deviations for inputs of unit variance."""

    constant: float = 32.0
    attention_logit: float = 12.0
    attention_out: float = 1.2
    dense_out: float = 0.5
    gate_logit: float = 1.0
    popularity: float = 0.03
    key: float = 4.0
    key_noise: float = 0.1
    num_voters: float = 3.5
    num_rungs: int = 4
    rung_ratio: float = 2.5
    rung_odds: float = 0.4
    gain: float = 0.05
    shared_gain: float = 0.005
    leak: float = 0.05
    logit_scale: float = 100.0
    logit_offset: float = 6.0


CHARACTERS = {
    "deepseek_v3": Character(),
    "mixtral": Character(gate_logit=0.5, popularity=0.3, gain=0.015),
}


@dataclass(frozen=True)
class Vocabulary:
    """The stand-in's tokens: specials, the 256 bytes, then the syllables and two-syllable words that its text is of."""

    specials: tuple[str, ...]
    tokens: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]

    @property
    def num_text(self) -> int:
        """How many tokens, the last ones, are text that an expert may vote for."""
        return len(self.tokens) - len(self.specials) - 256


def vocabulary(spec: ModelSpec) -> Vocabulary:
    """A byte-level BPE vocabulary of vocab_size tokens. Raises ModelError for a size that does not fit."""
    specials = {
        "deepseek_v3": (
            "<｜begin▁of▁sentence｜>",
            "<｜end▁of▁sentence｜>",
            "<｜▁pad▁｜>",
            "<｜User｜>",
            "<｜Assistant｜>",
        ),
        "mixtral": ("<unk>", "<s>", "</s>"),
    }[spec.family]
    syllables = [c + v for c in "bdfghjklmnprstvwyz" for v in "aeiou"]
    space = "\u0120"  # what byte-level BPE writes for a space
    merges = [(s[0], s[1]) for s in syllables] + [(space, s) for s in syllables]
    words = [(space + first, second) for first in syllables for second in syllables]
    num_words = spec.vocab_size - len(specials) - 256 - len(merges)
    if not 0 < num_words <= len(words):
        raise ModelError(
            f"{spec.source}: vocab_size is {spec.vocab_size}, expected {spec.vocab_size - num_words + 1} to "
            f"{spec.vocab_size - num_words + len(words)} for a synthetic checkpoint"
        )
    stride = next(n for n in range(int(len(words) * 0.618), len(words)) if math.gcd(n, len(words)) == 1)
    merges += [words[i * stride % len(words)] for i in range(num_words)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return Vocabulary(specials, (*specials, *alphabet, *(a + b for a, b in merges)), tuple(merges))


@dataclass(frozen=True)
class Weights:
    """The weights of a stand-in as float32, tensor by tensor, by their names in the checkpoint. Raises ModelError."""

    spec: ModelSpec
    seed: int
    zipf_exponent: float
    character: Character

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ModelError(f"{self.spec.source}: hidden_size is {self.spec.hidden_size}, expected at least 8")

    @cached_property
    def num_classes(self) -> int:
        """A power of two, so that the classes have orthogonal codes of +-1; a quarter of the coordinates or less."""
        return 1 << (self.spec.hidden_size // 4).bit_length() - 1

    def outer(self) -> Iterator[tuple[str, Float32Array]]:
        """The tensors outside the layers."""
        spec, character = self.spec, self.character
        name = "model.embed_tokens.weight"
        embedding = self._uniform(name, (spec.vocab_size, spec.hidden_size)) * self._writes
        embedding[:, self._class_coords] = self._class_codes[self._class_of_token]
        embedding[:, 0] = character.constant
        yield name, embedding
        yield "model.norm.weight", np.ones(spec.hidden_size, np.float32)
        name = "lm_head.weight"
        head = self._reader(f"{name}/noise", spec.vocab_size, character.leak)
        head[:, self._vote_coords] += self._vote_codes * np.float32(character.logit_scale)
        head[:, 0] = -character.logit_offset / character.constant
        yield name, head

    def layer(self, layer_idx: int) -> Iterator[tuple[str, Float32Array]]:
        """The tensors of one layer, experts last."""
        spec, prefix = self.spec, f"model.layers.{layer_idx}"
        yield f"{prefix}.input_layernorm.weight", np.ones(spec.hidden_size, np.float32)
        yield f"{prefix}.post_attention_layernorm.weight", np.ones(spec.hidden_size, np.float32)
        yield from self._attention(f"{prefix}.self_attn") if spec.mla is None else self._mla(f"{prefix}.self_attn")
        if layer_idx not in spec.moe_layers:
            yield from self._dense(f"{prefix}.mlp")
            return
        yield from self._gate(layer_idx)
        if spec.num_shared_experts:
            names = [f"{prefix}.mlp.shared_experts.{matrix}_proj.weight" for matrix in ("gate", "up", "down")]
            inter = spec.moe_intermediate_size * spec.num_shared_experts
            yield from self._expert(names, inter, self.character.shared_gain, 1.0)
        for expert_idx in range(spec.num_experts):
            names = [tensor.name for tensor in spec.expert_tensors(layer_idx, expert_idx)]
            odds = min(1.0, self.character.num_voters / (spec.top_k * spec.num_moe_layers))
            yield from self._expert(names, spec.moe_intermediate_size, self.character.gain, odds)

    def popularity_ranks(self, layer_idx: int) -> Int64Array:
        """int64 [E]: 0 for the expert of a MoE layer that is made the most popular."""
        order = np.argsort(self._bits(f"model.layers.{layer_idx}/popularity", self.spec.num_experts), kind="stable")
        return np.argsort(order)

    def _attention(self, prefix: str) -> Iterator[tuple[str, Float32Array]]:
        spec, character = self.spec, self.character
        sharp = math.sqrt(character.attention_logit)
        for matrix, num_heads, std in (
            ("q_proj", spec.num_heads, sharp),
            ("k_proj", spec.num_kv_heads, sharp),
            ("v_proj", spec.num_kv_heads, 1.0),
        ):
            name = f"{prefix}.{matrix}.weight"
            yield name, self._reader(name, num_heads * spec.head_dim, std)
        name = f"{prefix}.o_proj.weight"
        yield name, self._writer(name, spec.num_heads * spec.head_dim, character.attention_out)

    def _mla(self, prefix: str) -> Iterator[tuple[str, Float32Array]]:
        spec, character, mla = self.spec, self.character, self.spec.mla
        assert mla is not None
        sharp = math.sqrt(character.attention_logit)
        if mla.q_lora_rank is None:
            name = f"{prefix}.q_proj.weight"
            yield name, self._reader(name, spec.num_heads * spec.head_dim, sharp)
        else:
            name = f"{prefix}.q_a_proj.weight"
            yield name, self._reader(name, mla.q_lora_rank)
            yield f"{prefix}.q_a_layernorm.weight", np.ones(mla.q_lora_rank, np.float32)
            name = f"{prefix}.q_b_proj.weight"
            yield name, self._inner(name, spec.num_heads * spec.head_dim, mla.q_lora_rank, sharp)
        name = f"{prefix}.kv_a_proj_with_mqa.weight"
        kv_a = self._reader(name, mla.kv_lora_rank + mla.qk_rope_head_dim)
        kv_a[mla.kv_lora_rank :] *= sharp
        yield name, kv_a
        yield f"{prefix}.kv_a_layernorm.weight", np.ones(mla.kv_lora_rank, np.float32)
        name = f"{prefix}.kv_b_proj.weight"
        kv_b = self._inner(name, spec.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank, 1.0)
        kv_b.reshape(spec.num_heads, -1, mla.kv_lora_rank)[:, : mla.qk_nope_head_dim] *= sharp
        yield name, kv_b
        name = f"{prefix}.o_proj.weight"
        yield name, self._writer(name, spec.num_heads * mla.v_head_dim, character.attention_out)

    def _dense(self, prefix: str) -> Iterator[tuple[str, Float32Array]]:
        for matrix in ("gate_proj", "up_proj"):
            name = f"{prefix}.{matrix}.weight"
            yield name, self._reader(name, self.spec.intermediate_size)
        name = f"{prefix}.down_proj.weight"
        yield name, self._writer(name, self.spec.intermediate_size, self.character.dense_out)

    def _gate(self, layer_idx: int) -> Iterator[tuple[str, Float32Array]]:
        character, gate = self.character, self.spec.gate_tensors(layer_idx)
        weight = self._reader(gate.weight.name, self.spec.num_experts, character.gate_logit)
        ranks = self.popularity_ranks(layer_idx) + 1
        skew = -self.zipf_exponent * character.popularity * np.log(ranks).astype(np.float32)
        if gate.bias is None:
            weight[:, 0] = skew / character.constant
            yield gate.weight.name, weight
        else:
            yield gate.weight.name, weight
            yield gate.bias.name, skew

    def _expert(self, names: list[str], inter: int, gain: float, odds: float) -> Iterator[tuple[str, Float32Array]]:
        """names of gate [N, H], up [N, H] and down [H, N]; unit i of the N is keyed to class i mod C."""
        gate, up, down = names
        yield gate, self._keys(gate, inter, self.character.key)
        yield up, self._keys(up, inter, 1.0)
        yield down, self._votes(down, inter, gain, odds)

    def _keys(self, name: str, rows: int, std: float) -> Float32Array:
        """[rows, H]: `std` for an input of the row's class, noise otherwise."""
        keys = self._inner(name, rows, self.spec.hidden_size, self.character.key_noise)
        keys[:, 0] = 0
        classes = np.arange(rows) % self.num_classes
        keys[:, self._class_coords] += self._class_codes[classes] * np.float32(std / self.num_classes)
        return keys

    def _votes(self, name: str, cols: int, gain: float, odds: float) -> Float32Array:
        """[H, cols]: a column votes for one token with its rung's gain, by a chance of `odds`, or is silent."""
        character = self.character
        chance = (self._bits(f"{name}/rungs", self.num_classes) + 0.5) / 65536 / odds
        rungs = np.minimum(np.log(chance) / math.log(character.rung_odds), character.num_rungs - 1)
        rungs = np.floor(rungs).astype(np.int64) if odds < 1 else np.zeros(self.num_classes, np.int64)
        gains = np.where(rungs < 0, 0.0, gain * character.rung_ratio**rungs)
        classes = np.arange(cols) % self.num_classes
        tokens = self._token_of_vote[classes, rungs[classes]]
        votes = np.zeros((self.spec.hidden_size, cols), np.float32)
        votes[self._vote_coords] = self._inner(name, len(self._vote_coords), cols, gain * character.leak)
        votes[self._vote_coords] += (self._vote_codes[tokens] * gains[classes, None]).T
        return votes

    @cached_property
    def _class_coords(self) -> Int64Array:
        return 2 + 4 * np.arange(self.num_classes)

    @cached_property
    def _vote_coords(self) -> Int64Array:
        return np.arange(1, self.spec.hidden_size, 2)

    @cached_property
    def _state_coords(self) -> Int64Array:
        others = np.concatenate([[0], self._class_coords, self._vote_coords])
        return np.setdiff1d(np.arange(self.spec.hidden_size), others)

    @cached_property
    def _writes(self) -> Float32Array:
        """[H]: 1 for a state coordinate, 0 for any other."""
        strength = np.zeros(self.spec.hidden_size, np.float32)
        strength[self._state_coords] = 1
        return strength

    @cached_property
    def _class_codes(self) -> Float32Array:
        """[C, C]: Sylvester's Hadamard matrix."""
        codes = np.ones((1, 1), np.float32)
        while len(codes) < self.num_classes:
            codes = np.block([[codes, codes], [codes, -codes]])
        return codes

    @cached_property
    def _vote_codes(self) -> Float32Array:
        """[V, vote coordinates]: near-orthogonal codes of norm one."""
        return self._inner("lm_head.weight", self.spec.vocab_size, len(self._vote_coords), 1.0)

    @cached_property
    def _class_of_token(self) -> Int64Array:
        return np.arange(self.spec.vocab_size) % self.num_classes

    @cached_property
    def _token_of_vote(self) -> Int64Array:
        """[C, rungs]: the token that follows a class by a rung, of another class; no two alike while tokens last."""
        num_text = vocabulary(self.spec).num_text
        rungs = np.arange(self.character.num_rungs)
        steps = 1 + self._bits("steps", len(rungs)) % (self.num_classes - 1)
        classes = (np.arange(self.num_classes)[:, None] + steps) % self.num_classes
        return self.spec.vocab_size - num_text + (classes + self.num_classes * rungs) % num_text

    def _bits(self, name: str, count: int) -> npt.NDArray[np.uint16]:
        """uint16 [count], uniform."""
        key = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=16).digest()
        raw = np.random.Philox(key=np.frombuffer(key, "<u8")).random_raw(-(-count // 4))
        return np.asarray(raw, "<u8").view("<u2")[:count]

    def _uniform(self, name: str, shape: tuple[int, ...]) -> Float32Array:
        """Zero mean, unit variance."""
        values = self._bits(name, math.prod(shape)).astype(np.float32).reshape(shape)
        values -= np.float32(32767.5)
        values *= np.float32(math.sqrt(12) / 65536)
        return values

    def _inner(self, name: str, rows: int, cols: int, std: float) -> Float32Array:
        return self._uniform(name, (rows, cols)) * np.float32(std / math.sqrt(cols))

    def _reader(self, name: str, rows: int, std: float = 1.0) -> Float32Array:
        """[rows, H]: reads the state; everything else but the constant only as a leak."""
        return self._uniform(name, (rows, self.spec.hidden_size)) * (
            self._writes * np.float32(std / math.sqrt(len(self._state_coords)))
        )

    def _writer(self, name: str, cols: int, std: float) -> Float32Array:
        """[H, cols]: writes the state; everything else but the constant only as a leak."""
        return self._inner(name, self.spec.hidden_size, cols, std) * self._writes[:, None]


def write_checkpoint(
    config: Mapping[str, Any],
    path: str | Path,
    seed: int,
    zipf_exponent: float,
    on_progress: OnProgress | None = None,
) -> None:
    """Writes a checkpoint of the architecture in `config` (a Hugging Face config.json) into the directory `path`.

    One safetensors file per layer and one for the rest, the index, config.json, generation_config.json and the
    tokenizer. Weights are FP8 with scales where the real checkpoint's are, bf16 otherwise. Raises ModelError.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    spec = ModelSpec.from_config(config, "synthetic config")
    weights = Weights(spec, seed, zipf_exponent, CHARACTERS[spec.family])
    total = spec.num_moe_layers * spec.num_experts
    num_files = spec.num_layers + 1
    file_of: dict[str, str] = {}
    for file_idx in range(num_files):
        file = f"model-{file_idx + 1:05}-of-{num_files:05}.safetensors"
        tensors = weights.layer(file_idx) if file_idx < spec.num_layers else weights.outer()
        stored = dict(_stored(spec, tensors))
        save_file(stored, path / file, {"format": "pt"})
        file_of.update(dict.fromkeys(stored, file))
        if on_progress is not None:
            on_progress(sum(layer_idx <= file_idx for layer_idx in spec.moe_layers) * spec.num_experts, total)
    write_index(path, file_of)
    _write_json(path / "config.json", dict(config))
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    _write_json(path / "generation_config.json", {"_from_model_config": True, **tokens})
    _write_tokenizer(spec, path, **tokens)


def cached_checkpoint(
    preset: Preset,
    seed: int | None = None,
    zipf_exponent: float | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """The preset's stand-in in the user's cache directory, written on the first call with these parameters.

    Several processes may ask at once: each writes a directory of its own, the first to finish gives it its name.
    """
    seed = preset.seed if seed is None else seed
    zipf_exponent = preset.zipf_exponent if zipf_exponent is None else zipf_exponent
    character = asdict(CHARACTERS[preset.synthetic_spec.family])
    parameters = [FORMAT_VERSION, preset.synthetic_config, seed, zipf_exponent, character]
    key = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:12]
    path = cache_dir() / f"{preset.name}-{key}"
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        write_checkpoint(preset.synthetic_config, partial, seed, zipf_exponent, on_progress)
        partial.chmod(0o755)
        partial.rename(path)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def cache_dir() -> Path:
    """Where synthetic checkpoints are kept: $XDG_CACHE_HOME/ep or ~/.cache/ep."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ep"


def quantize_blocks(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [N, K] -> e4m3 [N, K] and float32 scale_inv [ceil(N / block[0]), ceil(K / block[1])]."""
    rows, cols = weight.shape
    padded = F.pad(weight, (0, -cols % block[1], 0, -rows % block[0]))
    tiles = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    limit = torch.finfo(torch.float8_e4m3fn).max
    scale_inv = tiles.abs().amax(dim=3).amax(dim=1).clamp_min(1e-10) / limit
    values = (tiles / scale_inv[:, None, :, None]).clamp(-limit, limit).to(torch.float8_e4m3fn)
    return values.flatten(2, 3).flatten(0, 1)[:rows, :cols].contiguous(), scale_inv


def _stored(spec: ModelSpec, tensors: Iterator[tuple[str, Float32Array]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors as the real checkpoint stores them: in FP8 are the matrices of attention and of all MLPs."""
    for name, array in tensors:
        tensor = torch.from_numpy(array)
        if name.endswith("e_score_correction_bias"):
            yield name, tensor
        elif spec.quant_block is not None and name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
            values, scale_inv = quantize_blocks(tensor, spec.quant_block)
            yield name, values
            yield f"{name}_scale_inv", scale_inv
        else:
            yield name, tensor.to(torch.bfloat16)


CHAT_TEMPLATES = {
    "deepseek_v3": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}"
        "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
        "{% else %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
    ),
    "mixtral": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\n' }}"
        "{% elif message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
}


def _write_tokenizer(spec: ModelSpec, path: Path, bos_token_id: int, eos_token_id: int) -> None:
    vocab = vocabulary(spec)
    tokenizer = Tokenizer(models.BPE({token: idx for idx, token in enumerate(vocab.tokens)}, list(vocab.merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in vocab.specials])
    bos, eos = vocab.tokens[bos_token_id], vocab.tokens[eos_token_id]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_token_id)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "clean_up_tokenization_spaces": False,
            "model_max_length": spec.max_position_embeddings,
            "chat_template": CHAT_TEMPLATES[spec.family],
        },
    )


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""The weights of a stand-in, made so that its greedy text is decisive, as a trained model's is.

Shape legend: H hidden, E experts, V vocabulary, C classes.

Every tensor is a pure function of (seed, tensor name), so of seed, layer, expert and matrix: random bits come from a
Philox stream keyed by a hash of both and do not depend on order or library versions.

A plain random model is nearly indifferent between its best tokens, so that rounding alone changes what it says; a
trained model is not. This one gets its confidence from where things lie in the residual stream:

- "class" coordinates hold the token's class, one of C orthogonal codes. An expert's hidden units are keyed to classes.
- "state" coordinates hold a random code of the token and what attention and the dense layers add: the context. Gates
  read them, so the context chooses the experts.
- "vote" coordinates hold what experts write, and lm_head reads. A unit that its class wakes votes for one vocabulary
  token with a gain out of a few widely spaced rungs; (class, rung) decides the token. The highest rung among the chosen
  experts wins, by a margin: experts on one rung agree, and a few votes of a lower rung do not add up to one of it.
- one constant coordinate, far larger than all others, lets rows have offsets and carries the norm.

Gates and attention do not read votes, and votes are too small to move the norm: rounding in the experts' sums reaches
neither routing nor the cache, and rarely the winning vote. A missing or wrong expert takes its votes with it.
Experts are popular by Zipf's law, through the gate's bias (deepseek_v3) or its offset (mixtral).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ep.errors import ModelError
from ep.model import ModelSpec
from ep.synthetic_text import vocabulary

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Character:
    """What decides a stand-in's text. Strengths are standard deviations where the input has unit variance.

    constant: the constant coordinate of the residual stream.
    attention_logit, attention_out, dense_out: strength of attention's logits and of what is added to the state.
    gate_logit: strength of the gate's logits. popularity: their skew for a Zipf exponent of one, by log(rank).
    key: what a unit's gate row gives for its own class. key_noise: for everything else.
    num_voters: how many of a token's chosen experts, over all layers, vote aloud on average; faint: strength of all the
        other votes together, against one vote on the lowest rung.
    num_rungs, rung_ratio, rung_odds: the rungs, the gain of one over the next, the chance of one over the next.
    gain: gain of the lowest rung. noise: random part of a vote, and of lm_head beside the codes.
    logit_scale: strength of a code in lm_head. logit_offset: what is taken off every logit, so that the best are near
        zero, where bf16 tells them apart best.
    """

    constant: float = 32.0
    attention_logit: float = 12.0
    attention_out: float = 1.2
    dense_out: float = 0.5
    gate_logit: float = 1.0
    popularity: float = 0.056
    key: float = 4.0
    key_noise: float = 0.1
    num_voters: float = 3.0
    faint: float = 0.5
    num_rungs: int = 3
    rung_ratio: float = 5.5
    rung_odds: float = 0.35
    gain: float = 0.0125
    noise: float = 0.05
    logit_scale: float = 720.0
    logit_offset: float = 6.0


CHARACTERS = {
    "deepseek_v3": Character(),
    "mixtral": Character(gate_logit=0.5, popularity=0.4, gain=0.004, logit_scale=450.0),
}


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
        head = self._reader(f"{name}/noise", spec.vocab_size, character.noise)
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
        character = self.character
        num_choices = spec.top_k * spec.num_moe_layers
        faint = character.gain * character.faint / num_choices
        if spec.num_shared_experts:
            names = [f"{prefix}.mlp.shared_experts.{matrix}_proj.weight" for matrix in ("gate", "up", "down")]
            yield from self._expert(names, spec.moe_intermediate_size * spec.num_shared_experts, faint, odds=0.0)
        odds = min(1.0, character.num_voters / num_choices)
        for expert_idx in range(spec.num_experts):
            names = [tensor.name for tensor in spec.expert_tensors(layer_idx, expert_idx)]
            yield from self._expert(names, spec.moe_intermediate_size, faint, odds)

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

    def _expert(self, names: list[str], inter: int, faint: float, odds: float) -> Iterator[tuple[str, Float32Array]]:
        """names of gate [N, H], up [N, H] and down [H, N]; unit i of the N is keyed to class i mod C."""
        gate, up, down = names
        yield gate, self._keys(gate, inter, self.character.key)
        yield up, self._keys(up, inter, 1.0)
        yield down, self._votes(down, inter, faint, odds)

    def _keys(self, name: str, rows: int, std: float) -> Float32Array:
        """[rows, H]: `std` for an input of the row's class, noise otherwise."""
        keys = self._inner(name, rows, self.spec.hidden_size, self.character.key_noise)
        keys[:, 0] = 0
        classes = np.arange(rows) % self.num_classes
        keys[:, self._class_coords] += self._class_codes[classes] * np.float32(std / self.num_classes)
        return keys

    def _votes(self, name: str, cols: int, faint: float, odds: float) -> Float32Array:
        """[H, cols]: each column votes for one token: by a chance of `odds` with its rung's gain, else with `faint`."""
        character = self.character
        chance = (self._bits(f"{name}/rungs", self.num_classes) + 0.5) / 65536
        rungs = np.minimum(np.log(chance) / math.log(character.rung_odds), character.num_rungs - 1).astype(np.int64)
        loud = self._bits(f"{name}/loud", self.num_classes) < 65536 * odds
        gains = np.where(loud, character.gain * character.rung_ratio**rungs, faint)
        classes = np.arange(cols) % self.num_classes
        tokens = self._token_of_vote[classes, np.where(loud, rungs, 0)[classes]]
        votes = np.zeros((self.spec.hidden_size, cols), np.float32)
        votes[self._vote_coords] = self._inner(name, len(self._vote_coords), cols, character.gain * character.noise)
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
        first = self.spec.vocab_size - num_text
        rungs = np.arange(self.character.num_rungs)
        steps = 1 + self._bits("steps", len(rungs)) % (self.num_classes - 1)
        classes = (np.arange(self.num_classes)[:, None] + steps) % self.num_classes
        return first + ((classes - first) % self.num_classes + self.num_classes * rungs) % num_text

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
        """[rows, H]: reads the state."""
        return self._uniform(name, (rows, self.spec.hidden_size)) * (
            self._writes * np.float32(std / math.sqrt(len(self._state_coords)))
        )

    def _writer(self, name: str, cols: int, std: float) -> Float32Array:
        """[H, cols]: writes the state."""
        return self._inner(name, self.spec.hidden_size, cols, std) * self._writes[:, None]

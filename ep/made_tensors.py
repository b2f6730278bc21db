"""The tensors of a checkpoint whose weights are made when they are read: by name, all that the published one has.

A folder with the marker file holds no weights. Every tensor follows from the seed, its name and the model's dims, so a
router, a shard and native vLLM make equal weights, each on the device that holds them (ep/made_values.py).

The weights are random, of the strength that keeps activations in range: rows read inputs of unit variance, and what a
layer adds to the residual stream is a fraction of what is there. One coordinate of the stream is a large constant, by
which lm_head shifts all logits so that the best are near zero, where bf16 tells them apart best.

Shape legend: H hidden, E experts, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ep.errors import CheckpointError
from ep.made_values import NORMAL, RULE_VERSION, fill, make_key
from ep.model import ModelSpec
from ep.stored_tensors import SINGLE_FILE
from ep.tensor_file import DTYPES

MARKER_FILE = "ep-made.json"

ATTENTION_LOGIT = 1.0
ATTENTION_OUT = 1.0
MLP_OUT = 1.0
"""What all layers' attentions, or MLPs, add to the stream together; a token's embedding is 1."""
GATE_BIAS = 0.02
LOGIT = 4.0
CONSTANT = 0.38
"""The constant coordinate over sqrt(H): 32 for DeepSeek-V3."""
ACTIVATION = 0.596
"""RMS of silu(a) * b for independent a and b of unit variance."""

_FP8_MAX = 448.0
_FP8_STEP = _FP8_MAX / NORMAL[-1]
"""What a value of NORMAL is multiplied by to become an FP8 code: the largest is e4m3's largest."""


@dataclass(frozen=True)
class MadeTensor:
    """file: the marker. std: of its values; 0 for a tensor of ones. first_column: what its column 0 holds instead.
    block_scale: these are the scales of an FP8 weight, around std."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    std: float
    first_column: float | None = None
    block_scale: bool = False


class MadeTensors:
    """The source of a Checkpoint's tensors that makes them. Raises CheckpointError for the marker."""

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self.seed = read_seed(folder / MARKER_FILE)
        self._entries = {tensor.name: tensor for tensor in all_tensors(spec, folder / MARKER_FILE)}

    def names(self) -> list[str]:
        return list(self._entries)

    def file_name(self, name: str) -> str:
        """The file that a written copy keeps the tensor in."""
        return SINGLE_FILE

    def entry(self, name: str) -> MadeTensor | None:
        """None where there is no such tensor."""
        return self._entries.get(name)

    def read_into(self, entry: MadeTensor, out: torch.Tensor) -> None:
        """Makes the tensor in `out`, contiguous, of its dtype and shape, on any device."""
        assert out.shape == entry.shape and out.dtype == DTYPES[entry.dtype]
        if entry.std == 0:
            out.fill_(1)
            return
        fill(out, _table(entry), make_key(self.seed, entry.name))
        if entry.first_column is not None:
            out[:, 0] = entry.first_column


def read_seed(marker: Path) -> int:
    """Raises CheckpointError for a marker that is unreadable or of another rule."""
    try:
        value = json.loads(marker.read_text(encoding="utf-8"))
        seed, rule = value["seed"], value["rule"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{marker}: no seed and rule can be read: {type(error).__name__}: {error}") from error
    if rule != RULE_VERSION or type(seed) is not int:
        raise CheckpointError(f"{marker}: rule is {rule!r}, seed {seed!r}, expected rule {RULE_VERSION} and an integer")
    return seed


def write_marker(folder: Path, seed: int) -> None:
    text = json.dumps({"seed": seed, "rule": RULE_VERSION})
    (folder / MARKER_FILE).write_text(text + "\n", encoding="utf-8")


def all_tensors(spec: ModelSpec, marker: Path) -> Iterator[MadeTensor]:
    """Every tensor of the model but those of layers for multi-token prediction."""
    return _Layout(spec, marker).tensors()


@dataclass(frozen=True)
class _Layout:
    spec: ModelSpec
    marker: Path

    def tensors(self) -> Iterator[MadeTensor]:
        spec = self.spec
        shape = (spec.vocab_size, spec.hidden_size)
        constant = CONSTANT * math.sqrt(spec.hidden_size)
        seen = constant / math.sqrt(1 + CONSTANT**2 + ATTENTION_OUT**2 + MLP_OUT**2)  # after the last norm
        best = LOGIT * math.sqrt(2 * math.log(spec.vocab_size))  # about the largest of so many logits
        yield self._plain("model.embed_tokens.weight", shape, 1, constant)
        for layer_idx in range(spec.num_layers):
            yield from self._layer(layer_idx)
        yield self._norm("model.norm", spec.hidden_size)
        yield self._plain("lm_head.weight", shape, LOGIT / math.sqrt(spec.hidden_size), -best / seen)

    def _layer(self, layer_idx: int) -> Iterator[MadeTensor]:
        spec, prefix = self.spec, f"model.layers.{layer_idx}"
        yield self._norm(f"{prefix}.input_layernorm", spec.hidden_size)
        yield self._norm(f"{prefix}.post_attention_layernorm", spec.hidden_size)
        yield from self._attention(f"{prefix}.self_attn") if spec.mla is None else self._mla(f"{prefix}.self_attn")
        out = MLP_OUT / math.sqrt(spec.num_layers)
        if layer_idx not in spec.moe_layers:
            yield from self._mlp(_names(f"{prefix}.mlp"), spec.intermediate_size, out)
            return
        gate = spec.gate_tensors(layer_idx)
        yield self._plain(gate.weight.name, gate.weight.shape, 1 / math.sqrt(spec.hidden_size))
        if gate.bias is not None:
            yield MadeTensor(self.marker, gate.bias.name, "F32", gate.bias.shape, GATE_BIAS)
        if spec.num_shared_experts:
            inter = spec.num_shared_experts * spec.moe_intermediate_size
            yield from self._mlp(_names(f"{prefix}.mlp.shared_experts"), inter, out)
        out *= math.sqrt(spec.top_k) / spec.routed_scaling_factor  # top_k weights that are much alike
        for expert_idx in range(spec.num_experts):
            names = [tensor.name.removesuffix(".weight") for tensor in spec.expert_tensors(layer_idx, expert_idx)]
            yield from self._mlp(names, spec.moe_intermediate_size, out)

    def _attention(self, prefix: str) -> Iterator[MadeTensor]:
        spec, sharp = self.spec, math.sqrt(ATTENTION_LOGIT)
        queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        yield from self._matrix(f"{prefix}.q_proj", queries, spec.hidden_size, sharp)
        yield from self._matrix(f"{prefix}.k_proj", keys, spec.hidden_size, sharp)
        yield from self._matrix(f"{prefix}.v_proj", keys, spec.hidden_size)
        yield from self._attention_out(prefix, queries)

    def _mla(self, prefix: str) -> Iterator[MadeTensor]:
        spec, mla = self.spec, self.spec.mla
        assert mla is not None
        queries = spec.num_heads * spec.head_dim
        if mla.q_lora_rank is None:
            yield from self._matrix(f"{prefix}.q_proj", queries, spec.hidden_size, ATTENTION_LOGIT)
        else:
            yield from self._matrix(f"{prefix}.q_a_proj", mla.q_lora_rank, spec.hidden_size)
            yield self._norm(f"{prefix}.q_a_layernorm", mla.q_lora_rank)
            yield from self._matrix(f"{prefix}.q_b_proj", queries, mla.q_lora_rank, ATTENTION_LOGIT)
        latent = mla.kv_lora_rank + mla.qk_rope_head_dim
        yield from self._matrix(f"{prefix}.kv_a_proj_with_mqa", latent, spec.hidden_size)
        yield self._norm(f"{prefix}.kv_a_layernorm", mla.kv_lora_rank)
        values = spec.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        yield from self._matrix(f"{prefix}.kv_b_proj", values, mla.kv_lora_rank)
        yield from self._attention_out(prefix, spec.num_heads * mla.v_head_dim)

    def _attention_out(self, prefix: str, columns: int) -> Iterator[MadeTensor]:
        strength = ATTENTION_OUT / math.sqrt(self.spec.num_layers)
        yield from self._matrix(f"{prefix}.o_proj", self.spec.hidden_size, columns, strength)

    def _mlp(self, names: Sequence[str], inter: int, out: float) -> Iterator[MadeTensor]:
        gate, up, down = names
        yield from self._matrix(gate, inter, self.spec.hidden_size)
        yield from self._matrix(up, inter, self.spec.hidden_size)
        yield from self._matrix(down, self.spec.hidden_size, inter, out / ACTIVATION)

    def _matrix(self, name: str, rows: int, columns: int, strength: float = 1.0) -> Iterator[MadeTensor]:
        """strength: standard deviation of the outputs for inputs of unit variance. FP8 where the real one's is."""
        name, shape, std = f"{name}.weight", (rows, columns), strength / math.sqrt(columns)
        if self.spec.quant_block is None:
            yield self._plain(name, shape, std)
            return
        yield MadeTensor(self.marker, name, "F8_E4M3", shape, _FP8_STEP)
        scales = self.spec.scale_shape(shape)
        yield MadeTensor(self.marker, f"{name}_scale_inv", "F32", scales, std / _FP8_STEP, block_scale=True)

    def _norm(self, name: str, size: int) -> MadeTensor:
        return self._plain(f"{name}.weight", (size,), 0)

    def _plain(self, name: str, shape: tuple[int, ...], std: float, first_column: float | None = None) -> MadeTensor:
        return MadeTensor(self.marker, name, "BF16", shape, std, first_column)


def _names(prefix: str) -> tuple[str, str, str]:
    return f"{prefix}.gate_proj", f"{prefix}.up_proj", f"{prefix}.down_proj"


def _table(entry: MadeTensor) -> torch.Tensor:
    """The 256 values that the tensor is made of. Block scales differ, so that one in another's place is noticed."""
    values = [0.75 + idx / 510 for idx in range(256)] if entry.block_scale else NORMAL
    return torch.tensor([entry.std * value for value in values], dtype=torch.float32).to(DTYPES[entry.dtype])

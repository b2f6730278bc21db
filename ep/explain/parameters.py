"""Every tensor of a model's checkpoint, in parts that add up: who holds it, how many parameters, how many bytes.

Shape legend: H hidden, N intermediate of an expert, I of a dense MLP, E experts, V vocabulary, A attention heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ep.model import ModelSpec, TensorSpec

Holder = Literal["router", "shards", "nobody"]


@dataclass(frozen=True)
class Part:
    """Tensors that always come together; their names have placeholders for layer and expert.

    layers: checkpoint's layer numbers, () outside the layers. experts: how many in each of these layers, 0 where the
    part is none of an expert. tensors: of one layer and expert, as the checkpoint stores them. itemsize: bytes of a
    value without scales. active: how many of `experts` compute one token. holder: nobody loads a layer of multi-token
    prediction.
    """

    name: str
    holder: Holder
    layers: tuple[int, ...]
    tensors: tuple[TensorSpec, ...]
    experts: int = 0
    active: int = 0
    itemsize: int = 2

    @property
    def copies(self) -> int:
        return max(1, len(self.layers)) * max(1, self.experts)

    @property
    def params_each(self) -> int:
        """Of one layer and one expert; scales are no parameters."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def bytes_each(self) -> int:
        """Of one layer and one expert, scales included."""
        return sum(stored_bytes(tensor, self.itemsize) for tensor in self.tensors)

    @property
    def params(self) -> int:
        return self.copies * self.params_each

    @property
    def bytes(self) -> int:
        return self.copies * self.bytes_each

    @property
    def active_params(self) -> int:
        """Parameters that one token is multiplied with."""
        return self.params if not self.experts else len(self.layers) * self.active * self.params_each

    def names(self) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """Name, shape and bytes of every tensor of the part in the checkpoint, scales apart."""
        for layer_idx in self.layers or (0,):
            for expert_idx in range(max(1, self.experts)):
                for tensor in self.tensors:
                    name = tensor.name.format(layer=layer_idx, expert=expert_idx)
                    size = 1 if tensor.scale_shape is not None else self.itemsize
                    yield name, tensor.shape, size * math.prod(tensor.shape)
                    if tensor.scale_shape is not None:
                        yield f"{name}_scale_inv", tensor.scale_shape, 4 * math.prod(tensor.scale_shape)


def stored_bytes(tensor: TensorSpec, itemsize: int = 2) -> int:
    """FP8 with float32 scales where there are scales, else itemsize bytes a value."""
    if tensor.scale_shape is None:
        return itemsize * math.prod(tensor.shape)
    return math.prod(tensor.shape) + 4 * math.prod(tensor.scale_shape)


def model_parts(spec: ModelSpec) -> tuple[Part, ...]:
    """All parts of the model proper, then those of its multi-token-prediction layers."""
    layers = tuple(range(spec.num_layers))
    dense = tuple(layer for layer in layers if layer not in spec.moe_layers)
    outer = (("embedding", "model.embed_tokens"), ("final norm", "model.norm"), ("head", "lm_head"))
    size = {"final norm": (spec.hidden_size,)}
    table = (spec.vocab_size, spec.hidden_size)
    parts = [_part(spec, name, "router", (), {prefix: size.get(name, table)}) for name, prefix in outer]
    parts += _attention(spec, "router", layers)
    if dense:
        parts.append(_part(spec, "dense MLP", "router", dense, _mlp("mlp", spec.hidden_size, spec.intermediate_size)))
    parts += _moe(spec, "router", "shards", spec.moe_layers)
    if spec.num_nextn_layers:
        parts += _next_token_parts(spec)
    return tuple(parts)


def attention_matrices(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """[out, in] of each matrix of a layer's attention."""
    hidden, heads, mla = spec.hidden_size, spec.num_heads, spec.mla
    if mla is None:
        keys = spec.num_kv_heads * spec.head_dim
        queries = heads * spec.head_dim
        inputs = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        return {**inputs, "o_proj": (hidden, queries)}
    q_lora = mla.q_lora_rank
    queries_of = {"q_proj": (heads * spec.head_dim, hidden)}
    if q_lora is not None:
        queries_of = {"q_a_proj": (q_lora, hidden), "q_b_proj": (heads * spec.head_dim, q_lora)}
    return {
        **queries_of,
        "kv_a_proj_with_mqa": (mla.kv_lora_rank + mla.qk_rope_head_dim, hidden),
        "kv_b_proj": (heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank),
        "o_proj": (hidden, heads * mla.v_head_dim),
    }


def _attention(spec: ModelSpec, holder: Holder, layers: tuple[int, ...]) -> list[Part]:
    parts = [
        _part(spec, matrix, holder, layers, {f"self_attn.{matrix}": shape})
        for matrix, shape in attention_matrices(spec).items()
    ]
    hidden = (spec.hidden_size,)
    norms: dict[str, tuple[int, ...]] = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if spec.mla is not None:
        if spec.mla.q_lora_rank is not None:
            norms["self_attn.q_a_layernorm"] = (spec.mla.q_lora_rank,)
        norms["self_attn.kv_a_layernorm"] = (spec.mla.kv_lora_rank,)
    return [*parts, _part(spec, "norms", holder, layers, norms)]


def _moe(spec: ModelSpec, holder: Holder, expert_holder: Holder, layers: tuple[int, ...]) -> list[Part]:
    gate = spec.gate_tensors(spec.moe_layers[0])
    parts = [Part("gate", holder, layers, (_anywhere(gate.weight),))]
    if gate.bias is not None:
        parts.append(Part("gate bias", holder, layers, (_anywhere(gate.bias),), itemsize=4))
    if spec.num_shared_experts:
        inter = spec.num_shared_experts * spec.moe_intermediate_size
        parts.append(_part(spec, "shared expert", holder, layers, _mlp("mlp.shared_experts", spec.hidden_size, inter)))
    experts = tuple(_anywhere(tensor) for tensor in spec.expert_tensors(spec.moe_layers[0], 0))
    parts.append(Part("routed experts", expert_holder, layers, experts, spec.num_experts, spec.top_k))
    return parts


def _next_token_parts(spec: ModelSpec) -> list[Part]:
    """Multi-token prediction: a whole layer each, with an embedding and a head of its own."""
    layers = tuple(range(spec.num_layers, spec.num_layers + spec.num_nextn_layers))
    hidden, table = spec.hidden_size, (spec.vocab_size, spec.hidden_size)
    own = {
        "enorm": (hidden,),
        "hnorm": (hidden,),
        "embed_tokens": table,
        "shared_head.norm": (hidden,),
        "shared_head.head": table,
    }
    joined = TensorSpec("model.layers.{layer}.eh_proj.weight", (hidden, 2 * hidden))
    return [
        _part(spec, "embedding, head, norms", "nobody", layers, own),
        Part("eh_proj", "nobody", layers, (joined,)),
        *_attention(spec, "nobody", layers),
        *_moe(spec, "nobody", "nobody", layers),
    ]


def _mlp(prefix: str, hidden: int, inter: int) -> dict[str, tuple[int, ...]]:
    up, down = (inter, hidden), (hidden, inter)
    return {f"{prefix}.gate_proj": up, f"{prefix}.up_proj": up, f"{prefix}.down_proj": down}


def _part(
    spec: ModelSpec, name: str, holder: Holder, layers: tuple[int, ...], shapes: dict[str, tuple[int, ...]]
) -> Part:
    """shapes: of the weights by module, below the layer where there are layers."""
    prefix = "model.layers.{layer}." if layers else ""
    tensors = []
    for module, shape in shapes.items():
        scaled = spec.quant_block is not None and module.endswith(("_proj", "_proj_with_mqa"))
        scale_shape = spec.scale_shape(shape) if scaled else None
        full = f"{prefix}{module}.weight"
        tensors.append(TensorSpec(full, shape, f"{full}_scale_inv" if scaled else None, scale_shape))
    return Part(name, holder, layers, tuple(tensors))


def _anywhere(tensor: TensorSpec) -> TensorSpec:
    """A tensor of the first MoE layer and expert, with placeholders for both in its name."""
    head, layer, rest = tensor.name.partition("layers.")
    assert layer, tensor.name
    rest = rest.partition(".")[2].replace("experts.0.", "experts.{expert}.")
    name = f"{head}layers.{{layer}}.{rest}"
    return TensorSpec(name, tensor.shape, tensor.scale_name and f"{name}_scale_inv", tensor.scale_shape)

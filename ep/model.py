"""What a Mixture-of-Experts model is, as far as serving its experts goes: dims, gating rule, tensor names and shapes.

A `ModelSpec` is read from a Hugging Face config.json. Two families are known: `deepseek_v3` (DeepSeek-V3, V3.1, R1)
and `mixtral` (8x7B, 8x22B).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ep.config_keys import ConfigKeys, read_config
from ep.errors import ModelError

Family = Literal["deepseek_v3", "mixtral"]

FAMILY_OF_ARCHITECTURE: dict[str, Family] = {
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "MixtralForCausalLM": "mixtral",
}
EXPERT_MATRICES = {
    "deepseek_v3": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
}


@dataclass(frozen=True)
class MlaSpec:
    """Multi-head latent attention of DeepSeek-V3. `q_lora_rank` is None where queries are not compressed."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class TensorSpec:
    """A weight in the checkpoint. The scale is None where the weight is not block-quantised."""

    name: str
    shape: tuple[int, ...]
    scale_name: str | None = None
    scale_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ExpertTensors:
    """The three matrices of one expert: gate and up are [N, H], down is [H, N]."""

    gate: TensorSpec
    up: TensorSpec
    down: TensorSpec

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter((self.gate, self.up, self.down))


@dataclass(frozen=True)
class GateTensors:
    """The gate of one MoE layer: weight [num_experts, H] and, for deepseek_v3, the score correction [num_experts]."""

    weight: TensorSpec
    bias: TensorSpec | None


@dataclass(frozen=True)
class ModelSpec:
    """One model. `moe_layers` are layer numbers as the checkpoint counts them; `layer_idx` below is such a number.

    `num_groups` and `topk_groups` are 1 for a gate without groups. `quant_block` is (rows, columns) of a scale block of
    the FP8 weights, None for a bf16 checkpoint. `head_dim` is the per-head query size.
    """

    family: Family
    source: str = field(compare=False)
    num_layers: int
    moe_layers: tuple[int, ...]
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k: int
    num_groups: int
    topk_groups: int
    num_shared_experts: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    scoring: Literal["sigmoid", "softmax"]
    quant_block: tuple[int, int] | None
    max_position_embeddings: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mla: MlaSpec | None
    rms_norm_eps: float
    num_nextn_layers: int = 0

    @classmethod
    def from_path(cls, path: str | Path) -> ModelSpec:
        """Reads `path`/config.json (or `path` itself, if it is a file). Raises ModelError."""
        path = Path(path)
        return cls.from_config(read_config(path), str(path if path.is_file() else path / "config.json"))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> ModelSpec:
        """The spec that a config.json describes; `source` names it in errors. Raises ModelError."""
        keys = ConfigKeys(config, source)
        architectures = config.get("architectures") or ["nothing"]
        family = FAMILY_OF_ARCHITECTURE.get(architectures[0])
        if family is None:
            known = ", ".join(FAMILY_OF_ARCHITECTURE)
            raise ModelError(f"{source}: architectures is {architectures[0]}, expected one of {known}")
        keys.expect("hidden_act", "silu", "silu")
        spec = _deepseek_v3(keys) if family == "deepseek_v3" else _mixtral(keys)
        spec._check()
        return spec

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def expert_bytes(self) -> int:
        """Bytes of one routed expert as the checkpoint stores it (FP8 weights and float32 scales, or bf16)."""
        if self.quant_block is None:
            return 2 * self.expert_params
        scales = sum(math.prod(t.scale_shape) for t in self.expert_tensors(self.moe_layers[0], 0) if t.scale_shape)
        return self.expert_params + 4 * scales

    def layer_pos(self, layer_idx: int) -> int:
        """Position of a layer among the MoE layers: the layer axis of a placement and of slot tensors."""
        return self.moe_layers.index(layer_idx)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a block-quantised weight: one per block, the last block of an axis may be partial."""
        if self.quant_block is None:
            raise ModelError(f"{self.source}: quantization_config is absent, so no weight has scales")
        return tuple(-(-size // block) for size, block in zip(shape, self.quant_block, strict=True))

    def expert_tensors(self, layer_idx: int, expert_idx: int) -> ExpertTensors:
        """Names and shapes of a logical expert's matrices in the checkpoint."""
        block, *matrices = EXPERT_MATRICES[self.family]
        up_shape = (self.moe_intermediate_size, self.hidden_size)
        down_shape = (self.hidden_size, self.moe_intermediate_size)
        gate, up, down = (
            self._matrix(f"model.layers.{layer_idx}.{block}.{expert_idx}.{matrix}.weight", shape)
            for matrix, shape in zip(matrices, (up_shape, up_shape, down_shape), strict=True)
        )
        return ExpertTensors(gate, up, down)

    def gate_tensors(self, layer_idx: int) -> GateTensors:
        """Names and shapes of a MoE layer's gate in the checkpoint; a gate is never quantised."""
        shape = (self.num_experts, self.hidden_size)
        if self.family == "mixtral":
            return GateTensors(TensorSpec(f"model.layers.{layer_idx}.block_sparse_moe.gate.weight", shape), None)
        prefix = f"model.layers.{layer_idx}.mlp.gate"
        bias = TensorSpec(f"{prefix}.e_score_correction_bias", (self.num_experts,))
        return GateTensors(TensorSpec(f"{prefix}.weight", shape), bias)

    def _matrix(self, name: str, shape: tuple[int, ...]) -> TensorSpec:
        if self.quant_block is None:
            return TensorSpec(name, shape)
        return TensorSpec(name, shape, f"{name}_scale_inv", self.scale_shape(shape))

    def _check(self) -> None:
        if not self.moe_layers:
            raise ModelError(f"{self.source}: none of the {self.num_layers} layers (num_hidden_layers) is a MoE layer")
        if self.num_experts % self.num_groups:
            raise ModelError(
                f"{self.source}: n_routed_experts is {self.num_experts}, "
                f"expected a multiple of n_group {self.num_groups}"
            )
        if self.topk_groups > self.num_groups:
            raise ModelError(
                f"{self.source}: topk_group is {self.topk_groups}, expected at most n_group {self.num_groups}"
            )
        if self.num_groups > 1 and self.num_experts < 2 * self.num_groups:
            raise ModelError(
                f"{self.source}: n_routed_experts is {self.num_experts}, "
                f"expected at least 2 for each of the {self.num_groups} groups (n_group)"
            )
        candidates = self.num_experts // self.num_groups * self.topk_groups
        if self.top_k > candidates:
            raise ModelError(
                f"{self.source}: num_experts_per_tok is {self.top_k}, "
                f"expected at most the {candidates} experts to choose from"
            )


def _deepseek_v3(keys: ConfigKeys) -> ModelSpec:
    keys.expect("topk_method", "noaux_tc", "noaux_tc")
    keys.expect("scoring_func", "sigmoid", "sigmoid")
    num_layers = keys.size("num_hidden_layers")
    num_dense = keys.size("first_k_dense_replace", minimum=0)
    layer_freq = keys.size("moe_layer_freq") if "moe_layer_freq" in keys.table else 1
    nope, rope = keys.size("qk_nope_head_dim"), keys.size("qk_rope_head_dim")
    return ModelSpec(
        family="deepseek_v3",
        source=keys.source,
        num_layers=num_layers,
        moe_layers=tuple(i for i in range(num_layers) if i >= num_dense and i % layer_freq == 0),
        hidden_size=keys.size("hidden_size"),
        intermediate_size=keys.size("intermediate_size"),
        moe_intermediate_size=keys.size("moe_intermediate_size"),
        num_experts=keys.size("n_routed_experts"),
        top_k=keys.size("num_experts_per_tok"),
        num_groups=keys.size("n_group"),
        topk_groups=keys.size("topk_group"),
        num_shared_experts=keys.size("n_shared_experts", minimum=0),
        routed_scaling_factor=keys.get("routed_scaling_factor", float),
        norm_topk_prob=keys.get("norm_topk_prob", bool),
        scoring="sigmoid",
        quant_block=_quant_block(keys),
        max_position_embeddings=keys.size("max_position_embeddings"),
        vocab_size=keys.size("vocab_size"),
        num_heads=keys.size("num_attention_heads"),
        num_kv_heads=keys.size("num_key_value_heads"),
        head_dim=nope + rope,
        mla=MlaSpec(
            q_lora_rank=keys.optional_size("q_lora_rank"),
            kv_lora_rank=keys.size("kv_lora_rank"),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
            v_head_dim=keys.size("v_head_dim"),
        ),
        rms_norm_eps=keys.get("rms_norm_eps", float),
        num_nextn_layers=keys.size("num_nextn_predict_layers", 0) if "num_nextn_predict_layers" in keys.table else 0,
    )


def _mixtral(keys: ConfigKeys) -> ModelSpec:
    if keys.table.get("quantization_config") is not None:
        raise ModelError(f"{keys.source}: quantization_config is set, expected an unquantised bf16 mixtral checkpoint")
    num_layers = keys.size("num_hidden_layers")
    hidden_size, num_heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    intermediate_size = keys.size("intermediate_size")
    return ModelSpec(
        family="mixtral",
        source=keys.source,
        num_layers=num_layers,
        moe_layers=tuple(range(num_layers)),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        moe_intermediate_size=intermediate_size,
        num_experts=keys.size("num_local_experts"),
        top_k=keys.size("num_experts_per_tok"),
        num_groups=1,
        topk_groups=1,
        num_shared_experts=0,
        routed_scaling_factor=1.0,
        norm_topk_prob=True,
        scoring="softmax",
        quant_block=None,
        max_position_embeddings=keys.size("max_position_embeddings"),
        vocab_size=keys.size("vocab_size"),
        num_heads=num_heads,
        num_kv_heads=keys.size("num_key_value_heads"),
        head_dim=keys.optional_size("head_dim") or hidden_size // num_heads,
        mla=None,
        rms_norm_eps=keys.get("rms_norm_eps", float),
    )


def _quant_block(keys: ConfigKeys) -> tuple[int, int] | None:
    if keys.table.get("quantization_config") is None:
        return None
    quant = ConfigKeys(keys.get("quantization_config", dict), f"{keys.source}: quantization_config")
    quant.expect("quant_method", "fp8", None)
    quant.expect("fmt", "e4m3", "e4m3")
    block = quant.get("weight_block_size", list)
    if len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise ModelError(f"{quant.source}: weight_block_size is {block}, expected [rows, columns]")
    return block[0], block[1]

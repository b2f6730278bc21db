"""Small models that several tests share: configs of both families, and the checkpoints made from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ep.presets import load_preset
from ep.synthetic import write_checkpoint


def small_config(family: str, **changes: Any) -> dict[str, Any]:
    """A config.json of the family that is written and read in a blink: two layers, the last of them MoE."""
    if family == "deepseek_v3":
        config = dict(load_preset("deepseek-v3").synthetic_config)
        config.update(num_hidden_layers=2, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4)
        config.update(hidden_size=192, intermediate_size=160, moe_intermediate_size=128, kv_lora_rank=64)
    else:
        config = dict(load_preset("mixtral-8x7b").synthetic_config)
        config.update(num_hidden_layers=2, hidden_size=192, intermediate_size=96, num_attention_heads=3)
        config.update(num_key_value_heads=1)
    return {**config, **changes}


def small_checkpoint(path: Path, family: str, config: Mapping[str, Any] | None = None, seed: int = 0) -> Path:
    """Writes the checkpoint of `small_config` (or of `config`) into `path` and returns it."""
    write_checkpoint(small_config(family) if config is None else config, path, seed=seed, zipf_exponent=0.6)
    return path

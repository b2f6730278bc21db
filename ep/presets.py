"""The models that ep knows by name.

configs/models/*.toml holds the published config.json of each and the changes that turn it into a small synthetic
stand-in of the same architecture.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ep.config_keys import ConfigKeys
from ep.errors import ModelError
from ep.model import FAMILY_OF_ARCHITECTURE, Family, ModelSpec

if sys.version_info >= (3, 11):
    from importlib.resources.abc import Traversable

    import tomllib
else:
    from importlib.abc import Traversable

    import tomli as tomllib

COMMON_KEYS = (
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "torch_dtype",
    "use_cache",
    "vocab_size",
)
CONFIG_KEYS: dict[Family, tuple[str, ...]] = {
    "deepseek_v3": (
        *COMMON_KEYS,
        "attention_bias",
        "ep_size",
        "first_k_dense_replace",
        "kv_lora_rank",
        "moe_intermediate_size",
        "moe_layer_freq",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "norm_topk_prob",
        "num_nextn_predict_layers",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "quantization_config",
        "rope_scaling",
        "routed_scaling_factor",
        "scoring_func",
        "topk_group",
        "topk_method",
        "v_head_dim",
    ),
    "mixtral": (*COMMON_KEYS, "num_local_experts", "output_router_logits", "router_aux_loss_coef"),
}


@dataclass(frozen=True)
class Preset:
    """A model that ep knows by name, and its synthetic stand-in: same architecture and file format, small dims.

    `repo` is the Hugging Face repository whose config.json `config` repeats. `seed` and `zipf_exponent` (skew of expert
    popularity) are the stand-in's defaults.
    """

    name: str
    repo: str
    config: Mapping[str, Any]
    spec: ModelSpec
    synthetic_config: Mapping[str, Any]
    synthetic_spec: ModelSpec
    seed: int
    zipf_exponent: float


def list_presets() -> list[str]:
    """Names of the known presets, sorted."""
    files = _preset_folder().iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load_preset(name: str) -> Preset:
    """Raises ModelError for a name that is no preset, and for a preset file with missing or unknown keys."""
    known = list_presets()
    if name not in known:
        raise ModelError(f"model is {name}, expected one of {', '.join(known)} or a directory with a config.json")
    file = _preset_folder() / f"{name}.toml"
    return parse_preset(name, file.read_text(encoding="utf-8"), str(file))


def parse_preset(name: str, text: str, source: str) -> Preset:
    """The preset that a TOML text describes; `source` names it in errors. Raises ModelError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ModelError(f"{source}: {error}") from error
    keys = ConfigKeys(table, source)
    keys.only("repo", "config", "synthetic")
    config = keys.get("config", dict)
    synthetic = ConfigKeys(keys.get("synthetic", dict), f"{source}: [synthetic]")
    synthetic.only("seed", "zipf_exponent", "config")
    changes = synthetic.get("config", dict)
    family = FAMILY_OF_ARCHITECTURE.get((config.get("architectures") or ["nothing"])[0])
    if family is not None:
        ConfigKeys(config, f"{source}: [config]").only(*CONFIG_KEYS[family])
    synthetic_config = _merge(config, changes, f"{source}: [synthetic.config]")
    return Preset(
        name=name,
        repo=keys.get("repo", str),
        config=config,
        spec=ModelSpec.from_config(config, f"{source}: [config]"),
        synthetic_config=synthetic_config,
        synthetic_spec=ModelSpec.from_config(synthetic_config, f"{source}: [synthetic.config]"),
        seed=synthetic.get("seed", int),
        zipf_exponent=synthetic.get("zipf_exponent", float),
    )


def _preset_folder() -> Traversable:
    return resources.files("ep") / "configs" / "models"


def _merge(config: Mapping[str, Any], changes: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`config` with `changes` laid over it, tables key by key; a change may not add a key."""
    ConfigKeys(changes, source).only(*config)
    return {
        key: _merge(value, changes[key], f"{source}: {key}")
        if isinstance(value, dict) and isinstance(changes.get(key), dict)
        else changes.get(key, value)
        for key, value in config.items()
    }

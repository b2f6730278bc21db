"""Folders of a preset's published shapes with its first layers only: no weights in them, they are made when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ep.errors import OptionError
from ep.made_tensors import write_marker
from ep.made_values import RULE_VERSION
from ep.model import ModelSpec
from ep.presets import Preset
from ep.synthetic import cached, write_configs

_TRANSFORMERS = "4.33.1"
"""As in DeepSeek-V3's config.json. Without a version transformers takes a large vocabulary for a faulty Mistral one."""

FORMAT_VERSION = 1
"""Part of the cache key: raise it when a folder of the same parameters holds other files."""


def slice_config(preset: Preset, num_layers: int) -> dict[str, Any]:
    """The published config.json with the first num_layers layers, a MoE layer among them, and none for multi-token
    prediction. Raises OptionError."""
    spec = preset.spec
    fewest = spec.moe_layers[0] + 1
    if not fewest <= num_layers <= spec.num_layers:
        dense = f", {spec.moe_layers[0]} of them dense" if spec.moe_layers[0] else ""
        raise OptionError(
            f"--layers {num_layers}: {preset.name} has {spec.num_layers} layers{dense}: "
            f"expected {fewest} to {spec.num_layers}"
        )
    config = {**preset.config, "num_hidden_layers": num_layers}
    if "num_nextn_predict_layers" in config:
        config["num_nextn_predict_layers"] = 0
    return config


def write_made(config: Mapping[str, Any], path: str | Path, seed: int) -> None:
    """Writes config.json, generation_config.json, the tokenizer and the marker into `path`. Raises ModelError."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    spec = ModelSpec.from_config(config, "slice config")
    write_configs(spec, {**config, "transformers_version": _TRANSFORMERS}, path)
    write_marker(path, seed)


def cached_slice(preset: Preset, num_layers: int, seed: int | None = None) -> Path:
    """The slice's folder in the user's cache directory, written on the first call. Raises OptionError."""
    seed = preset.seed if seed is None else seed
    config = slice_config(preset, num_layers)
    parameters = json.dumps([FORMAT_VERSION, RULE_VERSION, config, seed], sort_keys=True)
    key = hashlib.sha256(parameters.encode()).hexdigest()[:12]
    return cached(f"{preset.name}-{num_layers}-layers-{key}", lambda folder: write_made(config, folder, seed))

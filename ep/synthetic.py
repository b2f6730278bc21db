"""Writes a small checkpoint of a preset's architecture and file format: the stand-in for the real one.

`ep.synthetic_weights` makes the weights, `ep.synthetic_text` the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ep.checkpoint import write_index
from ep.model import ModelSpec
from ep.presets import Preset
from ep.synthetic_text import write_tokenizer
from ep.synthetic_weights import CHARACTERS, Float32Array, Weights

FORMAT_VERSION = 2
"""Part of the cache key: raise it when the same parameters give another checkpoint."""

OnProgress = Callable[[int, int], None]
"""Called with (experts done, experts in all)."""


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
    write_configs(spec, config, path)


def write_configs(spec: ModelSpec, config: Mapping[str, Any], path: Path) -> None:
    """Everything but the weights: config.json, generation_config.json and the tokenizer. Raises ModelError."""
    _write_json(path / "config.json", dict(config))
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    _write_json(path / "generation_config.json", {"_from_model_config": True, **tokens})
    write_tokenizer(spec, path, **tokens)


def cached_checkpoint(
    preset: Preset,
    seed: int | None = None,
    zipf_exponent: float | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """The preset's stand-in in the user's cache directory, written on the first call with these parameters."""
    seed = preset.seed if seed is None else seed
    zipf_exponent = preset.zipf_exponent if zipf_exponent is None else zipf_exponent
    character = asdict(CHARACTERS[preset.synthetic_spec.family])
    parameters = [FORMAT_VERSION, preset.synthetic_config, seed, zipf_exponent, character]
    key = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:12]
    return cached(
        f"{preset.name}-{key}",
        lambda folder: write_checkpoint(preset.synthetic_config, folder, seed, zipf_exponent, on_progress),
    )


def cached(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of this name in the cache directory, written into an empty one on the first call.

    Several processes may ask at once: each writes a directory of its own, the first to finish gives it its name.
    """
    path = cache_dir() / name
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        write(partial)
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


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

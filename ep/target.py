"""What a command is to work on: a checkpoint that was given, or a preset's synthetic stand-in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ep.checkpoint import Checkpoint
from ep.devices import count_gpus
from ep.errors import OptionError
from ep.made_slice import cached_slice
from ep.model import ModelSpec
from ep.presets import load_preset
from ep.synthetic import cached_checkpoint
from ep.terminal import Terminal


@dataclass(frozen=True)
class Target:
    """What is to be served. stand_in: a synthetic checkpoint in place of the real one.

    made: the folder holds no weights, they are made on the devices that hold them.
    """

    name: str
    checkpoint: Path
    spec: ModelSpec
    stand_in: bool
    made: bool = False


def resolve_target(
    model: str, checkpoint: str | None, synthetic: bool, terminal: Terminal, num_layers: int | None = None
) -> Target:
    """The checkpoint to serve: the one given, or the preset's synthetic stand-in (written once into the user's cache).

    num_layers: so many layers of the published shapes, with weights that are made, in place of the small stand-in.
    Raises ModelError for an unknown preset, OptionError for what excludes each other and where a GPU machine is asked
    to choose, CheckpointError.
    """
    if checkpoint is not None and synthetic:
        raise OptionError(f"--checkpoint {checkpoint} and --synthetic exclude each other")
    given = checkpoint or (model if (Path(model) / "config.json").is_file() else None)
    if num_layers is not None and (given is not None or not synthetic):
        what = f"{given} has its own layers" if given is not None else "goes with --synthetic"
        raise OptionError(f"--layers {num_layers}: {what}")
    if given is not None:
        found = Checkpoint(given)
        with terminal.console.status(f"checking {given}"):
            found.check()
        if checkpoint is not None and not Path(model).exists():
            _check_family(model, checkpoint, found.spec)
        return Target(model, found.path, found.spec, stand_in=False, made=found.is_made)
    preset = load_preset(model)
    if num_layers is not None:
        path = cached_slice(preset, num_layers)
        return Target(model, path, Checkpoint(path).spec, stand_in=True, made=True)
    if not synthetic and (num_gpus := count_gpus()):
        raise OptionError(
            f"{model}: this machine has {num_gpus} GPUs: give --checkpoint DIR for the real weights, "
            "or --synthetic for the small stand-in, with --layers N for N layers of the published shapes"
        )
    with terminal.progress(f"writing the synthetic {model}") as (bar, task):
        path = cached_checkpoint(preset, on_progress=lambda done, total: bar.update(task, completed=done, total=total))
    if not synthetic:
        spec = preset.synthetic_spec
        terminal.console.print(
            f"[yellow]No --checkpoint and no GPU: serving the synthetic stand-in of {model} on CPU "
            f"({spec.num_layers} layers, hidden {spec.hidden_size}, {spec.num_experts} experts, random weights).[/]"
        )
    return Target(model, path, preset.synthetic_spec, stand_in=True)


def _check_family(model: str, checkpoint: str, found: ModelSpec) -> None:
    expected = load_preset(model).spec.family
    if expected != found.family:
        raise OptionError(f"--checkpoint {checkpoint}: a {found.family} model, expected {expected} for {model}")

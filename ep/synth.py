"""`ep model synth`: write a synthetic checkpoint where the user wants it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from ep.checkpoint import write_dequantized
from ep.errors import OptionError
from ep.made_slice import slice_config, write_made
from ep.presets import load_preset
from ep.synthetic import write_checkpoint
from ep.terminal import Terminal


@dataclass(frozen=True)
class SynthOptions:
    """seed, zipf_exponent: None takes the preset's. bf16: FP8 weights multiplied out, no quantization_config.

    layers: so many layers of the published shapes and no weights, which are made when they are read.
    """

    preset: str
    folder: str
    seed: int | None = None
    zipf_exponent: float | None = None
    bf16: bool = False
    layers: int | None = None


def synth(options: SynthOptions) -> None:
    """Raises ModelError for an unknown preset, OptionError where the folder already holds something."""
    preset = load_preset(options.preset)
    target = Path(options.folder)
    if target.exists() and any(target.iterdir()):
        raise OptionError(f"{target}: is not empty")
    seed = preset.seed if options.seed is None else options.seed
    exponent = preset.zipf_exponent if options.zipf_exponent is None else options.zipf_exponent
    terminal = Terminal()
    if options.layers is not None:
        if options.bf16 or options.zipf_exponent is not None:
            raise OptionError(f"--layers {options.layers}: excludes --bf16 and --zipf")
        write_made(slice_config(preset, options.layers), target, seed)
        terminal.say(f"{target}: {options.layers} layers of {options.preset}, seed {seed}, weights made when read")
        return
    with tempfile.TemporaryDirectory() as scratch, terminal.progress(f"writing {target}") as (bar, task):
        written = Path(scratch) if options.bf16 else target
        write_checkpoint(
            preset.synthetic_config,
            written,
            seed,
            exponent,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
        if options.bf16:
            write_dequantized(written, target)
    terminal.say(f"{target}: {options.preset} stand-in, seed {seed}, zipf {exponent:g}")

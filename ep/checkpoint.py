"""Reads experts out of a Hugging Face checkpoint: only the tensors asked for, straight into the slots that keep them.

Shape legend: P slots, H hidden, N intermediate, E logical experts of a layer.
A shard's resident memory is its slots plus one matrix.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from ep.config_keys import read_config
from ep.errors import CheckpointError
from ep.made_tensors import MARKER_FILE, MadeTensors
from ep.model import ModelSpec, TensorSpec
from ep.placement import EMPTY, Int32Array
from ep.stored_tensors import INDEX_FILE, StoredTensors
from ep.tensor_file import DTYPES, read_header

FP8 = torch.float8_e4m3fn

Device = torch.device | str
OnProgress = Callable[[int, int], None]
"""Called with (experts done, experts in all)."""


@dataclass(frozen=True)
class SlotWeights:
    """The weights in one MoE layer's slots.

    w13 [P, 2N, H] (gate rows, then up rows) and w2 [P, H, N] in one dtype. Where FP8 is kept, w13_scale
    float32 [P, 2 * ceil(N / block), ceil(H / block)] and w2_scale float32 [P, ceil(H / block), ceil(N / block)].
    """

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None

    @property
    def num_slots(self) -> int:
        return self.w13.shape[0]


@dataclass(frozen=True)
class GateWeights:
    """A MoE layer's gate as stored: weight [E, H], bias [E] (the score correction of deepseek_v3) or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class Entry(Protocol):
    """A tensor of a checkpoint. dtype: as safetensors names it; file: what to blame for a wrong one."""

    @property
    def file(self) -> Path: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class TensorSource(Protocol):
    """Where a checkpoint's tensors come from. Raises CheckpointError."""

    def names(self) -> list[str]: ...

    def file_name(self, name: str) -> str:
        """Of the file that holds the tensor, or that would."""
        ...

    def entry(self, name: str) -> Any:
        """An Entry of its own kind; None where there is no such tensor."""
        ...

    def read_into(self, entry: Any, out: torch.Tensor) -> None:
        """Fills `out`, contiguous, of the entry's dtype and shape, on any device."""
        ...


class Checkpoint:
    """A directory with config.json and weights: safetensors files, or the marker by which they are made when read.

    Tensors are read to the CPU unless another device is named; made ones come into being there. Raises
    ModelError for the config, CheckpointError for everything else, here and in every method.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.spec = ModelSpec.from_path(self.path)
        self._source: TensorSource
        if (self.path / MARKER_FILE).exists():
            self._source = MadeTensors(self.path, self.spec)
        else:
            self._source = StoredTensors(self.path)

    @property
    def is_made(self) -> bool:
        """Whether the folder holds no weights: they are made when read."""
        return isinstance(self._source, MadeTensors)

    def check(self) -> None:
        """Verifies from the files' headers that every expert and gate tensor is there, with its dtype and shapes."""
        for layer_idx in self.spec.moe_layers:
            gate = self.spec.gate_tensors(layer_idx)
            for tensor in (gate.weight, gate.bias):
                if tensor is not None:
                    self._entry(tensor.name, tensor.shape)
            for expert_idx in range(self.spec.num_experts):
                for matrix in self.spec.expert_tensors(layer_idx, expert_idx):
                    self._matrix_entries(matrix)

    def tensor_names(self) -> list[str]:
        return self._source.names()

    def read_tensor(self, name: str, device: Device = "cpu") -> torch.Tensor:
        """Any tensor, as stored."""
        return self._read(self._entry(name), device)

    def read_dequantized(self, name: str, device: Device = "cpu") -> torch.Tensor:
        """Any tensor; bf16 if it is FP8 with block scales."""
        entry = self._entry(name)
        if entry.dtype != "F8_E4M3":
            return self._read(entry, device)
        out = torch.empty(entry.shape, dtype=torch.bfloat16, device=device)
        self._read_matrix(TensorSpec(name, entry.shape, f"{name}_scale_inv", self.spec.scale_shape(entry.shape)), out)
        return out

    def read_gate(self, layer_idx: int) -> GateWeights:
        gate = self.spec.gate_tensors(layer_idx)
        weight = self._read(self._entry(gate.weight.name, gate.weight.shape), "cpu")
        bias = None if gate.bias is None else self._read(self._entry(gate.bias.name, gate.bias.shape), "cpu")
        return GateWeights(weight, bias)

    def read_expert(self, layer_idx: int, expert_idx: int, dtype: torch.dtype = torch.bfloat16) -> SlotWeights:
        """One expert, dequantised, as SlotWeights with one slot."""
        out = self.allocate_slots(1, dtype)
        self.read_slots(layer_idx, [expert_idx], out)
        return out

    def allocate_slots(
        self,
        num_slots: int,
        dtype: torch.dtype = torch.bfloat16,
        keep_quantized: bool = False,
        device: Device = "cpu",
    ) -> SlotWeights:
        """Uninitialised slots of one layer: of `dtype`, or FP8 with scales if `keep_quantized`."""
        hidden, inter = self.spec.hidden_size, self.spec.moe_intermediate_size
        if not keep_quantized:
            return SlotWeights(
                torch.empty(num_slots, 2 * inter, hidden, dtype=dtype, device=device),
                torch.empty(num_slots, hidden, inter, dtype=dtype, device=device),
            )
        rows, cols = self.spec.scale_shape((inter, hidden))
        if inter % self._block[0]:
            raise CheckpointError(
                f"{self.path}: moe_intermediate_size is {inter}, not a multiple of the scale block {self._block[0]}"
            )
        return SlotWeights(
            torch.empty(num_slots, 2 * inter, hidden, dtype=FP8, device=device),
            torch.empty(num_slots, hidden, inter, dtype=FP8, device=device),
            torch.empty(num_slots, 2 * rows, cols, dtype=torch.float32, device=device),
            torch.empty(num_slots, *self.spec.scale_shape((hidden, inter)), dtype=torch.float32, device=device),
        )

    def read_slots(
        self, layer_idx: int, experts: Sequence[int], out: SlotWeights, on_expert: Callable[[], None] | None = None
    ) -> None:
        """Fills slot i of `out` with logical expert experts[i] of a layer; an EMPTY slot is zeroed."""
        inter = self.spec.moe_intermediate_size
        for slot, expert_idx in enumerate(experts):
            w13, w2 = out.w13[slot], out.w2[slot]
            if expert_idx == EMPTY:
                for tensor in (w13, w2, out.w13_scale, out.w2_scale):
                    if tensor is not None:
                        tensor.zero_() if tensor is w13 or tensor is w2 else tensor[slot].zero_()
                continue
            matrices = self.spec.expert_tensors(layer_idx, int(expert_idx))
            if out.w13_scale is None or out.w2_scale is None:
                self._read_matrix(matrices.gate, w13[:inter])
                self._read_matrix(matrices.up, w13[inter:])
                self._read_matrix(matrices.down, w2)
            else:
                gate_scale, up_scale = out.w13_scale[slot].chunk(2)
                self._read_quantized(matrices.gate, w13[:inter], gate_scale)
                self._read_quantized(matrices.up, w13[inter:], up_scale)
                self._read_quantized(matrices.down, w2, out.w2_scale[slot])
            if on_expert is not None:
                on_expert()

    def iter_slots(
        self,
        slots: Int32Array,
        dtype: torch.dtype = torch.bfloat16,
        keep_quantized: bool = False,
        on_progress: OnProgress | None = None,
        device: Device = "cpu",
        at_once: int | None = None,
    ) -> Iterator[SlotWeights]:
        """A shard's slots, layer after layer: slots int32 [MoE layers, P] of a placement. Each item has memory of its
        own and is a whole layer, or, where at_once is given, the next so many slots of it at most."""
        total = int((slots != EMPTY).sum())
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            if on_progress is not None:
                on_progress(done, total)

        for layer_idx, experts in zip(self.spec.moe_layers, slots, strict=True):
            for start in range(0, len(experts), at_once or len(experts)):
                piece = experts[start : start + (at_once or len(experts))].tolist()
                out = self.allocate_slots(len(piece), dtype, keep_quantized, device)
                self.read_slots(layer_idx, piece, out, count)
                yield out

    @property
    def _block(self) -> tuple[int, int]:
        if self.spec.quant_block is None:
            raise CheckpointError(f"{self.path}: not quantised, so there are no FP8 weights to keep")
        return self.spec.quant_block

    def _entry(self, name: str, shape: tuple[int, ...] | None = None, dtype: str | None = None) -> Entry:
        entry: Entry | None = self._source.entry(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        if shape is not None and entry.shape != shape:
            raise CheckpointError(f"{entry.file}: {name} has shape {list(entry.shape)}, expected {list(shape)}")
        if dtype is not None and entry.dtype != dtype:
            raise CheckpointError(f"{entry.file}: {name} has dtype {entry.dtype}, expected {dtype}")
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"{entry.file}: {name} has dtype {entry.dtype}, expected one of {', '.join(DTYPES)}")
        return entry

    def _matrix_entries(self, matrix: TensorSpec) -> tuple[Entry, Entry | None]:
        if matrix.scale_name is None:
            return self._entry(matrix.name, matrix.shape), None
        return (
            self._entry(matrix.name, matrix.shape, "F8_E4M3"),
            self._entry(matrix.scale_name, matrix.scale_shape, "F32"),
        )

    def _read(self, entry: Entry, device: Device) -> torch.Tensor:
        out = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device=device)
        self._source.read_into(entry, out)
        return out

    def _read_matrix(self, matrix: TensorSpec, out: torch.Tensor) -> None:
        """Fills `out` (contiguous, any dtype), dequantising where the matrix has scales."""
        entry, scale_entry = self._matrix_entries(matrix)
        if scale_entry is None:
            if out.dtype == DTYPES[entry.dtype]:
                self._source.read_into(entry, out)
            else:
                out.copy_(self._read(entry, out.device))
            return
        values = self._read(entry, out.device).float()
        row_block, col_block = self._block
        scales = self._read(scale_entry, out.device).repeat_interleave(col_block, dim=1)[:, : entry.shape[1]]
        for block_idx, rows in enumerate(values.split(row_block)):
            rows.mul_(scales[block_idx])
        out.copy_(values)

    def _read_quantized(self, matrix: TensorSpec, out: torch.Tensor, scale_out: torch.Tensor) -> None:
        entry, scale_entry = self._matrix_entries(matrix)
        assert scale_entry is not None
        self._source.read_into(entry, out)
        self._source.read_into(scale_entry, scale_out)


def write_dequantized(source: str | Path, target: str | Path) -> None:
    """Writes the same checkpoint in bf16: FP8 weights multiplied out, no scales, no quantization_config.

    For engines that cannot run block FP8. `target` is made; its files are overwritten. Raises CheckpointError.
    """
    checkpoint = Checkpoint(source)
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    config = read_config(source)
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    names_of: dict[str, list[str]] = {}
    for name in checkpoint.tensor_names():
        if not name.endswith("_scale_inv"):
            names_of.setdefault(checkpoint._source.file_name(name), []).append(name)
    for file, names in names_of.items():
        save_file({name: checkpoint.read_dequantized(name) for name in names}, target / file, {"format": "pt"})
    write_index(target, {name: file for file, names in names_of.items() for name in names})
    apart = ("config.json", INDEX_FILE, MARKER_FILE)
    for extra in checkpoint.path.iterdir():
        if extra.is_file() and extra.suffix != ".safetensors" and extra.name not in apart:
            shutil.copyfile(extra, target / extra.name)


def write_index(path: Path, file_of: dict[str, str]) -> None:
    """Writes the index of the safetensors files in `path`: file_of[tensor name] is a file name."""
    total = sum(entry.num_bytes for file in set(file_of.values()) for entry in read_header(path / file).values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
    (path / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

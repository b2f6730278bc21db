"""The tensors of a directory of safetensors files, with or without an index."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ep.errors import CheckpointError
from ep.tensor_file import StoredTensor, read_header, read_into

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class StoredTensors:
    """The source of a Checkpoint's tensors that reads them. Every method raises CheckpointError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._headers: dict[Path, dict[str, StoredTensor]] = {}
        self._files = self._read_index()

    def names(self) -> list[str]:
        return list(self._files)

    def file_name(self, name: str) -> str:
        return self._files[name].name

    def entry(self, name: str) -> StoredTensor | None:
        """None where there is no such tensor."""
        if name not in self._files:
            return None
        file = self._files[name]
        entry = self._header(file).get(name)
        if entry is None:
            raise CheckpointError(f"{file}: tensor {name} is missing, though {INDEX_FILE} says that it is here")
        return entry

    def read_into(self, entry: StoredTensor, out: torch.Tensor) -> None:
        """Fills `out`, contiguous, of its dtype and shape, on any device."""
        read_into(entry, out)

    def _read_index(self) -> dict[str, Path]:
        """The file of every tensor."""
        index = self._folder / INDEX_FILE
        if not index.is_file():
            single = self._folder / SINGLE_FILE
            if not single.is_file():
                raise CheckpointError(f"{self._folder}: holds neither {INDEX_FILE} nor {SINGLE_FILE}")
            return dict.fromkeys(self._header(single), single)
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: self._folder / file for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: no weight_map can be read: {type(error).__name__}: {error}") from error

    def _header(self, file: Path) -> dict[str, StoredTensor]:
        if file not in self._headers:
            self._headers[file] = read_header(file)
        return self._headers[file]

"""The tensors of one safetensors file: where they lie, and reading one into memory that is there already.

Read with pread into the destination rather than mapped: nothing of the file stays in the reader's resident memory.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ep.errors import CheckpointError

DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file; `start` counts from the beginning of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file: 8 bytes of header length, the header as JSON, then the data."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
            if length is None or 8 + length > size:
                raise CheckpointError(f"{file}: truncated: {size} bytes do not hold its safetensors header")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        data = 8 + length
        entries = {
            name: StoredTensor(
                file,
                info["dtype"],
                tuple(info["shape"]),
                data + info["data_offsets"][0],
                info["data_offsets"][1] - info["data_offsets"][0],
            )
            for name, info in header.items()
        }
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file, though the index names it") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file}: not a safetensors file: {type(error).__name__}: {error}") from error
    for name, entry in entries.items():
        if entry.start + entry.num_bytes > size:
            end = max(e.start + e.num_bytes for e in entries.values())
            raise CheckpointError(f"{file}: truncated: {size} bytes, expected {end} (the end of {name} is beyond it)")
        if entry.dtype in DTYPES and entry.num_bytes != math.prod(entry.shape) * DTYPES[entry.dtype].itemsize:
            raise CheckpointError(
                f"{file}: {name} has {entry.num_bytes} bytes, expected {entry.dtype} {list(entry.shape)}"
            )
    return entries


def read_into(entry: StoredTensor, out: torch.Tensor) -> None:
    """Fills a contiguous tensor of the entry's size, on any device, with its bytes."""
    assert out.is_contiguous() and out.numel() * out.itemsize == entry.num_bytes
    if out.device.type != "cpu":
        host = torch.empty_like(out, device="cpu")
        read_into(entry, host)
        out.copy_(host)
        return
    view = memoryview(out.view(-1).view(torch.uint8).numpy().data)
    try:
        fd = os.open(entry.file, os.O_RDONLY)
        try:
            done = 0
            while done < len(view):
                count = os.preadv(fd, [view[done:]], entry.start + done)
                if count == 0:
                    raise CheckpointError(f"{entry.file}: ends before byte {entry.start + entry.num_bytes}")
                done += count
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointError(f"{entry.file}: {error}") from error

"""Whether a checkpoint's files hold what its config promises: every tensor, its shape and its bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from ep.errors import CheckpointError
from ep.explain.parameters import Part
from ep.tensor_file import StoredTensor


def compare_tensors(parts: Sequence[Part], stored: Mapping[str, StoredTensor], source: str) -> int:
    """The bytes of all stored tensors. stored: by name, from the files' headers; a multi-token-prediction layer may be
    left out as a whole. Raises CheckpointError for the first tensor that is missing, unknown, of another shape or size.
    """
    expected = dict(_expected(parts, stored))
    for name, (shape, num_bytes) in expected.items():
        found = stored.get(name)
        if found is None:
            missing = sum(other not in stored for other in expected)
            raise CheckpointError(f"{source}: tensor {name} is missing ({missing} such tensors in all)")
        if found.shape != shape:
            raise CheckpointError(f"{found.file}: {name} has shape {list(found.shape)}, expected {list(shape)}")
        if found.num_bytes != num_bytes:
            raise CheckpointError(f"{found.file}: {name} has {found.num_bytes} bytes, expected {num_bytes}")
    for name in islice((name for name in stored if name not in expected), 1):
        raise CheckpointError(f"{source}: tensor {name} is none that its config asks for")
    return sum(tensor.num_bytes for tensor in stored.values())


def _expected(parts: Sequence[Part], stored: Mapping[str, StoredTensor]) -> dict[str, tuple[tuple[int, ...], int]]:
    unloaded = {layer for part in parts if part.holder == "nobody" for layer in part.layers}
    there = any(name.startswith(f"model.layers.{layer}.") for layer in unloaded for name in stored)
    return {
        name: (shape, num_bytes)
        for part in parts
        if part.holder != "nobody" or there
        for name, shape, num_bytes in part.names()
    }

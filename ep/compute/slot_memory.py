"""A slot as a run of bytes: its tensors one after the other, in whatever memory they lie.

What lies there is in the order that the compute path packed it in, so the bytes mean the same only where
`ExpertCompute.slot_format` is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


def num_bytes(parts: Sequence[torch.Tensor]) -> int:
    return sum(part.nbytes for part in parts)


def read(parts: Sequence[torch.Tensor], offset: int, out: torch.Tensor) -> None:
    """Copies the len(out) bytes from `offset` on into out, uint8 in host memory."""
    for piece, start in _pieces(parts, offset, len(out)):
        out[start : start + len(piece)].copy_(piece)


def write(parts: Sequence[torch.Tensor], offset: int, data: torch.Tensor) -> None:
    """Copies data, uint8 in host memory, to the slot from `offset` on."""
    for piece, start in _pieces(parts, offset, len(data)):
        piece.copy_(data[start : start + len(piece)])


def _pieces(parts: Sequence[torch.Tensor], offset: int, length: int) -> Iterator[tuple[torch.Tensor, int]]:
    """The parts' bytes that lie in [offset, offset + length), each with its place in that range."""
    assert offset >= 0 and offset + length <= num_bytes(parts)
    start = 0
    for part in parts:
        flat = part.reshape(-1).view(torch.uint8)
        assert flat.data_ptr() == part.data_ptr(), "a slot's tensors are contiguous"
        low, high = max(offset, start), min(offset + length, start + len(flat))
        if low < high:
            yield flat[low - start : high - start], low - offset
        start += len(flat)

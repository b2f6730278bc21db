"""The memory of one direction of a connection: a block, then the payload, with typed views of its parts.

Shape legend: T tokens, H hidden, P pairs (token, slot).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ep.wire import BLOCK_BYTES, ROW_BYTES, Dispatch, dispatch_layout, num_scales

TORCH_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "fp8": torch.float8_e4m3fn}
RAW_DTYPES = {"bf16": np.int16, "f32": np.float32, "fp8": np.uint8}
"""numpy's dtypes of the same size: it knows neither bf16 nor fp8, and moves rows at less cost per call than torch."""

RawRows = npt.NDArray[np.int16 | np.float32 | np.uint8]


@dataclass(frozen=True)
class DispatchViews:
    """The parts of a Dispatch payload in place: counts int32 [T], slot_ids int32 [P], weights float32 [P], rows [T, H]
    in the dispatch dtype's raw form, and for fp8 scales float32 [T, ceil(H / 128)]."""

    counts: npt.NDArray[np.int32]
    slot_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    rows: RawRows
    scales: npt.NDArray[np.float32] | None


def to_raw(rows: torch.Tensor, dtype: str) -> RawRows:
    """The same memory for numpy, after a cast if rows are of another dtype."""
    rows = rows.to(TORCH_DTYPES[dtype])
    return (rows if dtype == "f32" else rows.view(_TORCH_RAW[dtype])).numpy()


def from_raw(rows: RawRows, dtype: str) -> torch.Tensor:
    """The same memory for torch."""
    tensor = torch.from_numpy(rows)
    return tensor if dtype == "f32" else tensor.view(TORCH_DTYPES[dtype])


_TORCH_RAW = {"bf16": torch.int16, "fp8": torch.uint8}


class Buffer:
    """BLOCK_BYTES + capacity bytes: private memory (its pages are taken when first written) or part of a mapping."""

    def __init__(self, capacity: int, memory: npt.NDArray[np.uint8] | None = None) -> None:
        if memory is None:
            memory = np.empty(BLOCK_BYTES + capacity, dtype=np.uint8)
        assert memory.dtype == np.uint8 and len(memory) == BLOCK_BYTES + capacity
        self.capacity = capacity
        self.block = memory.data[:BLOCK_BYTES]
        self.payload = memory.data[BLOCK_BYTES:]
        self._bytes = memory[BLOCK_BYTES:]

    def dispatch_views(self, message: Dispatch, hidden_size: int) -> DispatchViews:
        num_tokens, num_pairs = message.num_tokens, message.num_pairs
        layout = dispatch_layout(num_tokens, num_pairs, hidden_size, message.dtype)
        assert layout.total <= self.capacity
        scales = None
        if message.dtype == "fp8":
            width = num_scales(hidden_size)
            scales = self._part(layout.scales, 4 * num_tokens * width).view(np.float32).reshape(-1, width)
        return DispatchViews(
            counts=self._part(layout.counts, 4 * num_tokens).view(np.int32),
            slot_ids=self._part(layout.slot_ids, 4 * num_pairs).view(np.int32),
            weights=self._part(layout.weights, 4 * num_pairs).view(np.float32),
            rows=self._rows(layout.rows, num_tokens, hidden_size, message.dtype),
            scales=scales,
        )

    def raw(self, num_bytes: int) -> torch.Tensor:
        """The first bytes of the payload, uint8."""
        return torch.from_numpy(self._bytes[:num_bytes])

    def combine_rows(self, num_tokens: int, hidden_size: int, dtype: str) -> torch.Tensor:
        """The payload of a Combine: [num_tokens, hidden_size] of `dtype`."""
        return from_raw(self._rows(0, num_tokens, hidden_size, dtype), dtype)

    def _rows(self, start: int, num_tokens: int, hidden_size: int, dtype: str) -> RawRows:
        num_bytes = num_tokens * hidden_size * ROW_BYTES[dtype]
        return self._part(start, num_bytes).view(RAW_DTYPES[dtype]).reshape(num_tokens, hidden_size)

    def _part(self, start: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        return self._bytes[start : start + num_bytes]

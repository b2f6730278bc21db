"""The memory of one direction of a connection: a block, then the payload, with typed views of its parts.

Shape legend: T tokens, H hidden, P pairs (token, slot).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ep.wire import BLOCK_BYTES, ROW_BYTES, Dispatch, DispatchLayout, dispatch_layout, num_scales

TORCH_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class DispatchViews:
    """The parts of a Dispatch payload in place: slot_ids int32 [P], weights float32 [P], rows [T, H] of the dispatch
    dtype, and for fp8 scales float32 [T, ceil(H / 128)]."""

    slot_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    rows: torch.Tensor
    scales: npt.NDArray[np.float32] | None


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
        self._tensor = torch.from_numpy(self._bytes)
        self._typed = {name: self._tensor[: capacity // 4 * 4].view(dtype) for name, dtype in TORCH_DTYPES.items()}

    def dispatch_views(self, message: Dispatch, hidden_size: int) -> DispatchViews:
        num_tokens, num_pairs = message.num_tokens, message.num_pairs
        layout = dispatch_layout(num_tokens, num_pairs, hidden_size, message.dtype)
        assert layout.total <= self.capacity
        return DispatchViews(
            slot_ids=self._bytes[: 4 * num_pairs].view(np.int32),
            weights=self._bytes[layout.weights : layout.weights + 4 * num_pairs].view(np.float32),
            rows=self.rows(num_tokens, hidden_size, message.dtype, layout.rows),
            scales=self._scales(layout, num_tokens, hidden_size) if message.dtype == "fp8" else None,
        )

    def rows(self, num_tokens: int, hidden_size: int, dtype: str, start: int = 0) -> torch.Tensor:
        """[num_tokens, hidden_size] of `dtype` from byte `start` of the payload."""
        first = start // ROW_BYTES[dtype]
        return self._typed[dtype][first : first + num_tokens * hidden_size].view(num_tokens, hidden_size)

    def _scales(self, layout: DispatchLayout, num_tokens: int, hidden_size: int) -> npt.NDArray[np.float32]:
        width = num_scales(hidden_size)
        return self._bytes[layout.scales : layout.scales + 4 * num_tokens * width].view(np.float32).reshape(-1, width)

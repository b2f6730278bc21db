"""From a token's logical experts to the slots of this GPU that hold them, and a count of what was chosen: one kernel.

Shapes: T tokens (padding included), K choices per token, L MoE layers, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

BLOCK = 256
MAX_PAIRS = 1 << 31


@dataclass(frozen=True)
class Assigned:
    """slots int32 [T, K], -1 for padding and for what is no expert; num_tokens int32 [1], those of the T rows that are
    tokens."""

    slots: torch.Tensor
    num_tokens: torch.Tensor


def supports(num_rows: int, top_k: int, num_layers: int, num_experts: int) -> tuple[bool, str]:
    """Whether the kernel's int32 offsets reach all of it, and why not."""
    for what, count in (("choices", num_rows * top_k), ("counters", 2 * num_layers * num_experts)):
        if count >= MAX_PAIRS:
            return False, f"{count} {what}, expected fewer than {MAX_PAIRS}"
    return True, "ok"


def assign_slots(
    topk_ids: torch.Tensor, slot_of: torch.Tensor, sizes: torch.Tensor, load: torch.Tensor, layer_pos: int
) -> Assigned:
    """topk_ids int32 [T, K] -> slots of one layer, and load int64 [2, L, E] (prefill, decode) grows by a pair for each.

    slot_of int32 [L, E]. sizes int32 [2]: of the step, how many rows are tokens and how many of them, the first ones,
    are decode. Launches only. Raises ValueError with the reason when `supports` says no. Twin: the same of `reference`.
    """
    (num_rows, top_k), (num_layers, num_experts) = topk_ids.shape, slot_of.shape
    supported, reason = supports(num_rows, top_k, num_layers, num_experts)
    if not supported:
        raise ValueError(f"assign_slots: {reason}")
    slots = torch.empty_like(topk_ids)
    num_tokens = torch.empty(1, dtype=torch.int32, device=topk_ids.device)
    grid = (max(triton.cdiv(num_rows * top_k, BLOCK), 1),)
    _assign_kernel[grid](
        topk_ids, slot_of, sizes, load, slots, num_tokens, num_rows, layer_pos, num_layers, num_experts,
        TOP_K=top_k, BLOCK=BLOCK,
    )  # fmt: skip
    return Assigned(slots, num_tokens)


@triton.jit(do_not_specialize=["num_rows", "layer_pos", "num_layers", "num_experts"])
def _assign_kernel(
    topk_ids_ptr, slot_of_ptr, sizes_ptr, load_ptr, slots_ptr, num_tokens_ptr, num_rows, layer_pos, num_layers,
    num_experts, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK pairs of a token and a choice."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    num_tokens = tl.minimum(tl.load(sizes_ptr), num_rows)
    num_decode = tl.load(sizes_ptr + 1)
    token = pair // TOP_K
    is_pair = token < num_rows
    expert = tl.load(topk_ids_ptr + pair, mask=is_pair, other=-1)
    is_real = (token < num_tokens) & (expert >= 0) & (expert < num_experts)
    key = layer_pos * num_experts + expert
    slot = tl.load(slot_of_ptr + key, mask=is_real, other=-1)
    tl.store(slots_ptr + pair, slot, mask=is_pair)
    phase = tl.where(token < num_decode, num_layers * num_experts, 0)
    one = tl.full((BLOCK,), 1, tl.int64)
    tl.atomic_add(load_ptr + phase + key, one, mask=is_real, sem="relaxed")
    if tl.program_id(0) == 0:
        tl.store(num_tokens_ptr, num_tokens)

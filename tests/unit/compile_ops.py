"""Cross-compiles what a shard and a router run beside the grouped GEMMs, for a GPU that is not here, and prints what it
uses as JSON.

    python tests/unit/compile_ops.py gfx942 | sm_90
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from ep.kernels import fused_moe, gating, permute, quant, slots
from ep.presets import load_preset
from tests.unit.cross_compile import record

MODULES = {
    "_route_kernel": gating, "_quantize_tokens_kernel": quant, "_count_kernel": permute, "_start_kernel": permute,
    "_permute_kernel": permute, "sum_choices_kernel": fused_moe, "_assign_kernel": slots,
}  # fmt: skip


def main(arch: str) -> list[dict[str, Any]]:
    """Every kernel as the ops launch it, for few and for many tokens, at DeepSeek-V3's size and at Mixtral's."""
    found = record(arch, MODULES)
    is_amd = arch.startswith("gfx")
    fp8 = torch.float8_e4m3fnuz if is_amd else torch.float8_e4m3fn
    for model, dtype in (("deepseek-v3", fp8), ("mixtral-8x7b", torch.bfloat16)):
        rule = load_preset(model).spec
        hidden, num_experts = rule.hidden_size, rule.num_experts
        for num_tokens in (2, 32, 256, 1024):
            x = torch.zeros(num_tokens, hidden, dtype=torch.bfloat16)
            bias = torch.zeros(num_experts) if rule.scoring == "sigmoid" else None
            ids = gating.route(torch.zeros(num_tokens, num_experts), bias, rule).topk_ids
            slot_of, load = torch.zeros(58, num_experts, dtype=torch.int32), torch.zeros(2, 58, num_experts).long()
            slots.assign_slots(ids, slot_of, torch.zeros(2, dtype=torch.int32), load, 0)
            _experts(x, None, ids, num_experts // 2, dtype, not is_amd)
            if dtype != torch.bfloat16:
                quantized = quant.quantize_tokens(x, dtype)
                _experts(quantized.q, quantized.scale_inv, ids, num_experts // 2, dtype, not is_amd)
    return found


def _experts(
    x: torch.Tensor, scales: torch.Tensor | None, ids: torch.Tensor, num_slots: int, dtype: torch.dtype, pdl: bool
) -> None:
    (num_tokens, top_k), hidden = ids.shape, x.shape[1]
    num_rows = num_tokens * top_k
    rows = torch.zeros(num_rows + fused_moe.SLACK_ROWS, hidden, dtype=dtype)
    quantized = dtype != torch.bfloat16
    row_scales = torch.zeros(hidden // 128, num_rows + fused_moe.SLACK_ROWS) if quantized else None
    ints = [torch.zeros(4096, dtype=torch.int32) for _ in range(4)]
    counts, starts = torch.zeros(2, permute.num_chunks(num_tokens, top_k), num_slots, dtype=torch.int32)
    permute.permute_tokens(
        x, scales, ids, ints[0], rows, row_scales, ints[1], ints[2], ints[3], counts, starts, None,
        num_slots=num_slots, block_m=16, fp8_max=quant.fp8_max(dtype) if quantized else 0.0, pdl=pdl,
    )  # fmt: skip
    parts = torch.zeros(num_rows, hidden)
    fused_moe.sum_choices(parts, ids, ints[0], torch.zeros(num_tokens, hidden, dtype=torch.bfloat16), num_slots)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))

"""Cross-compiles every kernel of the ipc data plane for a GPU that is not here and prints what it uses as JSON.

    python tests/unit/compile_p2p.py gfx942 | sm_90
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from ep.kernels import p2p
from tests.unit.cross_compile import record

KERNELS = ("dispatch_kernel", "wait_kernel", "combine_kernel", "wait_and_combine_kernel", "take_kernel",
           "collect_kernel", "return_kernel", "begin_kernel")  # fmt: skip


def main(arch: str) -> list[dict[str, Any]]:
    """Every kernel as the ops launch it, at DeepSeek-V3's size and at Mixtral's."""
    found = record(arch, dict.fromkeys(KERNELS, p2p))
    fp8 = torch.float8_e4m3fnuz if arch.startswith("gfx") else torch.float8_e4m3fn
    for hidden, top_k, num_experts, dtype, partial_dtype in (
        (7168, 8, 256, fp8, torch.bfloat16), (4096, 2, 8, torch.bfloat16, torch.float32),
    ):  # fmt: skip
        for num_shards, rows in ((2, 8), (8, 512)):
            _launch_all(p2p.MessageShape(rows, hidden, top_k, dtype, partial_dtype), num_experts, num_shards)
    return found


def _launch_all(message: Any, num_experts: int, num_shards: int) -> None:
    rows, hidden, top_k = message.max_tokens, message.hidden, message.top_k
    cpu = torch.device("cpu")
    plan = p2p.Plan.allocate(rows, top_k, num_shards, cpu)
    tables = p2p.Tables(
        torch.zeros(2, num_experts, num_shards, dtype=torch.int32), torch.ones(2, num_experts, dtype=torch.int32), 4
    )
    words, addresses = torch.zeros(512, dtype=torch.int32), torch.zeros(8, dtype=torch.int64)
    ids, weights = torch.zeros(rows, top_k, dtype=torch.int32), torch.zeros(rows, top_k)
    x = torch.zeros(rows, hidden, dtype=torch.bfloat16)
    load = torch.zeros(2, 2, num_experts, dtype=torch.int64)
    p2p.begin_step(words, 1, rows, 0, 1, 1)
    p2p.dispatch_tokens(x, ids, weights, tables, plan, message, load, addresses, addresses, words, 0)
    flags = torch.zeros(num_shards, rows, dtype=torch.int32)
    p2p.wait_partials(plan, flags, words, 1, rows)
    partials = torch.zeros(num_shards, rows, hidden, dtype=message.partial_dtype)
    p2p.wait_and_combine(partials, plan, x, flags, words, 1)
    p2p.combine_partials(partials, plan, x)
    job = p2p.Job.allocate(message, rows, cpu)
    desk = p2p.Desk.allocate(8, cpu, 1)
    p2p.take(desk, message, 58, job, rows, 4096, 200, 1000, 96, 128)
    p2p.collect(desk, message, job, rows)
    p2p.return_partials(partials[0], job, addresses, addresses, desk, rows)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))

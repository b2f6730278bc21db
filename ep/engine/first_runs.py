"""What follows a step's graph is run for batches of every size before anything is served.

A GPU's library loads a kernel when it first runs, for which the GPU may have to be idle. Behind a step that waits for a
shard of its own process that would be for ever: meanwhile the process can launch nothing, the shard's answer included.

Shape legend: R requests, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch


def run_sampling(runner: Any) -> None:
    """Logits and greedy tokens of R requests, for R = 1, 2, 4, 8, then every multiple of 8 that vLLM's runner may be
    asked for: the product of [R, H] and [H, V] has a kernel of its own for many R. No-op on a CPU.

    vLLM itself has run a batch that draws its tokens, whose kernel it compiles anew for every R, for seconds each.
    """
    if runner.device.type == "cpu":
        return
    most, hidden_size = runner.max_num_reqs, runner.model_config.get_hidden_size()
    hidden = torch.zeros(most, hidden_size, dtype=runner.dtype, device=runner.device)
    with torch.inference_mode():
        for num_requests in sorted({1, 2, 4, most, *range(8, most, 8)}):
            logits = runner.model.compute_logits(hidden[:num_requests])
            if logits is not None:  # a rank that does not sample has none
                logits.to(torch.float32).argmax(dim=-1)
    torch.accelerator.synchronize()

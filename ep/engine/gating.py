"""Top-k choice from gate logits in the order of operations of vLLM's own CPU router.

`kernels.reference.route` is the same rule; this one keeps vLLM's operations one by one (unsorted top-k, no routed scale
in the weights), so that a partial's sum runs over the experts in the order in which native vLLM adds them.

Shape legend: T tokens, E logical experts, K top-k.
"""

from __future__ import annotations

import torch

from ep.kernels.reference import GateRule, Routing


def route_like_vllm(logits: torch.Tensor, bias: torch.Tensor | None, rule: GateRule) -> Routing:
    """logits [T, E], bias [E] or None -> Routing; the caller multiplies the routed sum by routed_scaling_factor."""
    if rule.scoring == "softmax":
        values, topk_ids = torch.topk(logits, k=rule.top_k, dim=-1, sorted=False)
        return Routing(topk_ids.to(torch.int32), torch.softmax(values, dim=-1).to(torch.float32))
    scores = logits.float().sigmoid()
    choice = scores if bias is None else scores + bias.unsqueeze(0)
    groups = choice.view(choice.shape[0], rule.num_groups, -1)
    group_scores = groups.topk(2, dim=-1)[0].sum(dim=-1)
    group_idx = torch.topk(group_scores, k=rule.topk_groups, dim=-1, sorted=False)[1]
    kept = torch.zeros_like(group_scores).scatter_(1, group_idx, 1).bool()
    choice = groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)
    topk_ids = torch.topk(choice, k=rule.top_k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, topk_ids)
    if rule.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(topk_ids.to(torch.int32), weights)

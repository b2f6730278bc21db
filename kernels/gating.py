"""Which experts a token goes to, from the gate's logits, in one kernel.

Shapes: T tokens, E logical experts, G groups, K choices per token.

The rules are those of `reference.route`: DeepSeek-V3's sigmoid with correction bias, groups and renormalisation, and
Mixtral's softmax. Of equals the lowest expert (and the lowest group) is chosen first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ep.kernels.reference import GateRule, Routing

MAX_EXPERTS = 1024


def supports(num_experts: int, rule: GateRule) -> tuple[bool, str]:
    """Whether `route` can run a gate of this size and rule, and why not."""
    if rule.scoring not in ("sigmoid", "softmax"):
        return False, f"scoring is {rule.scoring}, expected sigmoid or softmax"
    if not 0 < num_experts <= MAX_EXPERTS:
        return False, f"{num_experts} experts, expected 1 to {MAX_EXPERTS}"
    if num_experts % rule.num_groups or not 0 < rule.topk_groups <= rule.num_groups:
        return False, f"{rule.topk_groups} of {rule.num_groups} groups of {num_experts} experts"
    if rule.num_groups > 1:
        size = num_experts // rule.num_groups
        if size & (size - 1) or rule.num_groups & (rule.num_groups - 1) or size < 2:
            return False, f"{rule.num_groups} groups of {size} experts, expected powers of two"
    if not 0 < rule.top_k <= num_experts // rule.num_groups * rule.topk_groups:
        return False, f"top {rule.top_k} of {num_experts // rule.num_groups * rule.topk_groups} eligible experts"
    return True, "ok"


def route(logits: torch.Tensor, bias: torch.Tensor | None, rule: GateRule) -> Routing:
    """logits [T, E] float32 or bf16, bias [E] or None -> Routing (int32 ids, float32 weights, [T, K], best first).

    Raises ValueError with the reason when `supports` says no. Twin: `reference.route`.
    """
    num_tokens, num_experts = logits.shape
    supported, reason = supports(num_experts, rule)
    if not supported:
        raise ValueError(f"route: {reason}")
    topk_ids = torch.empty(num_tokens, rule.top_k, dtype=torch.int32, device=logits.device)
    topk_weights = torch.empty(num_tokens, rule.top_k, dtype=torch.float32, device=logits.device)
    if num_tokens:
        groups = rule.num_groups
        experts = triton.next_power_of_2(num_experts)
        _route_kernel[(num_tokens,)](
            logits, bias, topk_ids, topk_weights, logits.stride(0), num_experts, rule.routed_scaling_factor,
            EXPERTS=experts, GROUPS=groups, GROUP_SIZE=experts // groups, TOPK_GROUPS=rule.topk_groups,
            TOP_K=rule.top_k, K_PAD=triton.next_power_of_2(rule.top_k), SIGMOID=rule.scoring == "sigmoid",
            HAS_BIAS=bias is not None, RENORMALIZE=rule.norm_topk_prob, num_warps=1,
        )  # fmt: skip
    return Routing(topk_ids, topk_weights)


@triton.jit(do_not_specialize=["num_experts", "scaling_factor"])
def _route_kernel(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, logits_stride, num_experts, scaling_factor,
    EXPERTS: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, TOPK_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr, K_PAD: tl.constexpr, SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """One token. Experts lie in [GROUPS, GROUP_SIZE]."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    expert = group[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    exists = expert < num_experts
    logits = tl.load(logits_ptr + token * logits_stride + expert, mask=exists, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        scores = tl.exp(logits - tl.max(logits))
        scores = scores / tl.sum(scores)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + expert, mask=exists, other=0.0).to(tl.float32)
    choice = tl.where(exists, choice, float("-inf"))
    if GROUPS > 1:
        best = tl.max(choice, 1)
        first = tl.min(tl.where(choice == best[:, None], expert, EXPERTS), 1)
        second = tl.max(tl.where(expert == first[:, None], float("-inf"), choice), 1)
        group_score = best + second
        kept = tl.zeros((GROUPS,), tl.int32)
        for _ in tl.static_range(TOPK_GROUPS):
            winner = tl.min(tl.where(group_score == tl.max(group_score), group, GROUPS))
            kept = tl.where(group == winner, 1, kept)
            group_score = tl.where(group == winner, float("-inf"), group_score)
        choice = tl.where((kept > 0)[:, None], choice, float("-inf"))
    k = tl.arange(0, K_PAD)
    ids = tl.zeros((K_PAD,), tl.int32)
    weights = tl.zeros((K_PAD,), tl.float32)
    for i in tl.static_range(TOP_K):
        winner = tl.min(tl.where(choice == tl.max(choice), expert, EXPERTS))
        score = tl.sum(tl.where(expert == winner, scores, 0.0))
        ids = tl.where(k == i, winner, ids)
        weights = tl.where(k == i, score, weights)
        choice = tl.where(expert == winner, float("-inf"), choice)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights) + 1e-20)
    tl.store(ids_ptr + token * TOP_K + k, ids, mask=k < TOP_K)
    tl.store(weights_ptr + token * TOP_K + k, weights * scaling_factor, mask=k < TOP_K)

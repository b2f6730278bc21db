"""The reference's choice of experts against vLLM's own grouped top-k."""

from __future__ import annotations

import pytest
import torch

from ep.kernels.reference import route
from ep.presets import load_preset


@pytest.mark.parametrize("skew", [0.0, 0.3])
def test_gating_equals_vllm_grouped_topk(skew: float) -> None:
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import grouped_topk

    spec = load_preset("deepseek-v3").spec
    torch.manual_seed(0)
    logits, bias = torch.randn(256, spec.num_experts), torch.randn(spec.num_experts) * skew
    weights, ids = grouped_topk(
        torch.empty(256, 1),
        logits,
        topk=spec.top_k,
        renormalize=spec.norm_topk_prob,
        num_expert_group=spec.num_groups,
        topk_group=spec.topk_groups,
        scoring_func=spec.scoring,
        routed_scaling_factor=spec.routed_scaling_factor,
        e_score_correction_bias=bias,
    )
    routing = route(logits, bias, spec)
    order, wanted_order = routing.topk_ids.argsort(dim=-1), ids.argsort(dim=-1)
    assert torch.equal(routing.topk_ids.gather(1, order), ids.gather(1, wanted_order).int())
    torch.testing.assert_close(
        routing.topk_weights.gather(1, order), weights.gather(1, wanted_order), rtol=1e-5, atol=0
    )

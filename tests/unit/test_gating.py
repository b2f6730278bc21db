"""The gating kernel against the torch twin, and its ties against a stable sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep.kernels import gating, reference
from tests.unit.kernel_cases import Rule, on_cpu

DEEPSEEK = Rule(8, num_groups=8, topk_groups=4, routed_scaling_factor=2.5, scoring="sigmoid")
RULES = (
    (256, DEEPSEEK),
    (64, Rule(6, num_groups=4, topk_groups=2, scoring="sigmoid", norm_topk_prob=False)),
    (8, Rule(2)),
    (10, Rule(3, scoring="sigmoid")),
)


@on_cpu
@settings(max_examples=20)
@given(case=st.sampled_from(RULES), num_tokens=st.integers(0, 5), has_bias=st.booleans(), seed=st.integers(0, 2**31))
def test_choices_and_weights_are_the_twins(case: tuple[int, Rule], num_tokens: int, has_bias: bool, seed: int) -> None:
    num_experts, rule = case
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    bias = torch.randn(num_experts, generator=generator) * 0.1 if has_bias else None
    got, expected = gating.route(logits, bias, rule), reference.route(logits, bias, rule)
    assert torch.equal(got.topk_ids, expected.topk_ids)
    torch.testing.assert_close(got.topk_weights, expected.topk_weights, rtol=1e-5, atol=1e-7)


def stable_route(choice: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Ids by stable sorts, so that of equals the first comes first."""
    groups = choice.unflatten(-1, (rule.num_groups, -1))
    best = groups.sort(dim=-1, descending=True, stable=True).values[..., :2].sum(-1)
    kept = best.sort(dim=-1, descending=True, stable=True).indices[:, : rule.topk_groups]
    mask = torch.zeros_like(best, dtype=torch.bool).scatter_(1, kept, True)
    eligible = groups.masked_fill(~mask[..., None], float("-inf")).flatten(1)
    return eligible.sort(dim=-1, descending=True, stable=True).indices[:, : rule.top_k].int()


@on_cpu
@settings(max_examples=15)
@given(levels=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_of_equals_the_lowest_is_chosen(levels: int, seed: int) -> None:
    logits = torch.randint(0, levels, (3, 256), generator=torch.Generator().manual_seed(seed)).float()
    assert torch.equal(gating.route(logits, None, DEEPSEEK).topk_ids, stable_route(logits.sigmoid(), DEEPSEEK))


@pytest.mark.parametrize(
    ("num_experts", "rule", "reason"),
    [
        (250, DEEPSEEK, "4 of 8 groups of 250 experts"),
        (48, Rule(2, num_groups=4, topk_groups=2), "4 groups of 12 experts, expected powers of two"),
        (2048, Rule(2), "2048 experts, expected 1 to 1024"),
        (8, Rule(9), "top 9 of 8 eligible experts"),
        (8, Rule(2, scoring="tanh"), "scoring is tanh"),
    ],
)
def test_unsupported_gates_are_named(num_experts: int, rule: Rule, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        gating.route(torch.zeros(1, num_experts), None, rule)

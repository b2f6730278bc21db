"""The torch twins against independent implementations: transformers' MoE blocks and float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ep.kernels import reference
from ep.kernels.reference import Experts


@dataclass(frozen=True)
class Rule:
    top_k: int
    num_groups: int = 1
    topk_groups: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    scoring: str = "softmax"


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def randomise(module: nn.Module, seed: int) -> None:
    """Weights of about unit gain; the score correction of DeepSeek's gate too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.normal_(0, tensor.shape[-1] ** -0.5)


def deepseek_v3(rule: Rule, hidden: int, inter: int, num_experts: int, num_shared: int, seed: int) -> nn.Module:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=hidden,
        moe_intermediate_size=inter,
        n_routed_experts=num_experts,
        num_experts_per_tok=rule.top_k,
        n_group=rule.num_groups,
        topk_group=rule.topk_groups,
        n_shared_experts=num_shared,
        routed_scaling_factor=rule.routed_scaling_factor,
        norm_topk_prob=rule.norm_topk_prob,
    )
    config._experts_implementation = "eager"
    block = DeepseekV3MoE(config)
    randomise(block, seed)
    return block


@settings(max_examples=25)
@given(st.data())
def test_moe_block_equals_transformers_deepseek_v3(data: st.DataObject) -> None:
    num_groups = data.draw(st.sampled_from([1, 2, 4]))
    group_size = data.draw(st.integers(2, 6))
    topk_groups = data.draw(st.integers(1, num_groups))
    rule = Rule(
        top_k=data.draw(st.integers(1, topk_groups * group_size)),
        num_groups=num_groups,
        topk_groups=topk_groups,
        routed_scaling_factor=data.draw(st.sampled_from([1.0, 2.5])),
        norm_topk_prob=data.draw(st.booleans()),
        scoring="sigmoid",
    )
    hidden, inter = data.draw(st.integers(1, 48)), data.draw(st.integers(1, 40))
    seed = data.draw(st.integers(0, 99))
    block = deepseek_v3(rule, hidden, inter, num_groups * group_size, data.draw(st.integers(1, 2)), seed)
    shared = block.shared_experts
    x = torch.randn(data.draw(st.integers(1, 9)), hidden)
    actual = reference.moe_forward(
        x,
        block.gate.weight,
        block.gate.e_score_correction_bias,
        Experts(block.experts.gate_up_proj, block.experts.down_proj),
        rule,
        Experts(
            torch.cat([shared.gate_proj.weight, shared.up_proj.weight])[None],
            shared.down_proj.weight[None],
        ),
    )
    assert relative_error(actual, block(x[None])[0]) <= 1e-5


@settings(max_examples=25)
@given(st.integers(1, 48), st.integers(1, 40), st.integers(1, 8), st.integers(1, 9), st.integers(0, 99))
def test_moe_block_equals_transformers_mixtral(hidden: int, inter: int, top_k: int, num_tokens: int, seed: int) -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=hidden, intermediate_size=inter, num_local_experts=8, num_experts_per_tok=top_k)
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config).eval()
    randomise(block, seed)
    x = torch.randn(num_tokens, hidden)
    experts = Experts(block.experts.gate_up_proj, block.experts.down_proj)
    actual = reference.moe_forward(x, block.gate.weight, None, experts, Rule(top_k))
    assert relative_error(actual, block(x[None])[0]) <= 1e-5


def test_chosen_experts_come_best_first_and_in_the_best_groups() -> None:
    logits = torch.tensor([[3.0, -9.0, 2.0, 1.9, 2.5, -9.0]])
    rule = Rule(3, num_groups=3, topk_groups=2, scoring="sigmoid")
    routing = reference.route(logits, None, rule)
    # Sums of two: group 0 0.953, group 1 1.750, group 2 0.924.
    assert routing.topk_ids.tolist() == [[0, 2, 3]] and routing.topk_ids.dtype == torch.int32
    assert routing.topk_weights.sum().item() == pytest.approx(1.0)


@given(st.integers(0, 99), st.integers(1, 4))
def test_partials_of_shards_sum_to_the_whole(seed: int, num_shards: int) -> None:
    torch.manual_seed(seed)
    num_experts, hidden, inter, top_k = 8, 12, 10, 3
    experts = Experts(
        torch.randn(num_experts, 2 * inter, hidden, dtype=torch.float64),
        torch.randn(num_experts, hidden, inter, dtype=torch.float64),
    )
    x = torch.randn(5, hidden, dtype=torch.float64)
    weights, ids = torch.rand(5, num_experts, dtype=torch.float64).topk(top_k)
    whole = reference.experts_forward(x, ids, weights, experts)
    total = torch.zeros_like(whole)
    for held in torch.arange(num_experts).tensor_split(num_shards):
        slots = torch.full((num_experts,), -1)
        slots[held] = torch.arange(len(held))
        total += reference.experts_forward(x, slots[ids], weights, Experts(experts.w13[held], experts.w2[held]))
    assert relative_error(total, whole) < 1e-12


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([(128, 128), (64, 32)]), st.integers(-30, 20))
def test_block_round_trip_is_within_half_a_step(rows: int, cols: int, block: tuple[int, int], exponent: int) -> None:
    torch.manual_seed(rows * 1000 + cols)
    w = torch.randn(rows, cols) * 2.0**exponent
    quantized = reference.quantize_blocks(w, block)
    assert quantized.q.shape == w.shape and quantized.q.dtype == torch.float8_e4m3fn
    assert quantized.scale_inv.shape == (-(-rows // block[0]), -(-cols // block[1]))
    error = (reference.dequantize_blocks(quantized.q, quantized.scale_inv, block) - w).abs()
    scales = quantized.scale_inv.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :cols]
    # e4m3 has 3 bits of mantissa (half a step is 2^-4 of the value) and steps of 2^-9 below 2^-6.
    assert (error <= torch.maximum(w.abs() * 2.0**-4, scales * 2.0**-10) * 1.0001).all()
    largest = reference.dequantize_blocks(quantized.q, quantized.scale_inv, block).abs().max()
    assert largest == pytest.approx(w.abs().max().item(), rel=1e-6)


@given(st.integers(1, 5), st.integers(1, 300))
def test_tokens_are_scaled_each_for_itself(num_tokens: int, hidden: int) -> None:
    torch.manual_seed(hidden)
    x = torch.randn(num_tokens, hidden) * 10.0 ** torch.arange(num_tokens)[:, None]
    quantized = reference.quantize_tokens(x)
    assert quantized.scale_inv.shape == (num_tokens, -(-hidden // 128))
    for token in range(num_tokens):
        alone = reference.quantize_tokens(x[token : token + 1])
        assert torch.equal(alone.q[0].view(torch.uint8), quantized.q[token].view(torch.uint8))
        assert torch.equal(alone.scale_inv[0], quantized.scale_inv[token])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
def test_extreme_values_stay_finite(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 256)
    x[0, 0], x[0, 1], x[0, 2] = 3.0e38, -3.0e38, 1e-38
    quantized = reference.quantize_blocks(x, (1, 128), dtype)
    back = reference.dequantize_tokens(quantized.q, quantized.scale_inv)
    assert back.isfinite().all() and (back[1] == 0).all() and (back[:, 128:] == 0).all()
    assert back[0, 0].item() == pytest.approx(3.0e38, rel=1e-5)
    assert quantized.q.float().abs().max() == torch.finfo(dtype).max


def test_fp8_activations_cost_a_few_percent_and_no_more() -> None:
    torch.manual_seed(0)
    x, w13, w2 = torch.randn(16, 256), torch.randn(512, 256) / 16, torch.randn(256, 256) / 16
    exact = reference.expert_mlp(x, w13, w2)
    rounded = reference.expert_mlp(x, w13, w2, quantize_activations=True)
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 0.005 < error < 0.06


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_output_has_the_inputs_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    experts = Experts(torch.randn(4, 16, 8).to(dtype), torch.randn(4, 8, 8).to(dtype))
    x = torch.randn(3, 8).to(dtype)
    out = reference.moe_forward(x, torch.randn(4, 8), None, experts, Rule(2), Experts(experts.w13[:1], experts.w2[:1]))
    assert out.dtype == dtype and out.shape == x.shape

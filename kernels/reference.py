"""The torch twin of every op: gating, block quantisation and the whole Mixture-of-Experts block.

The truth that kernels, transports and placements are checked against; itself checked against transformers' DeepseekV3
and Mixtral blocks. Written to be read, not to be fast.

Shape legend: T tokens, H hidden, E experts or slots, K top-k, N intermediate, G groups of experts.
Everything is computed in float32 (float64 for float64 inputs), whatever the inputs' dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

TOKEN_BLOCK = 128
"""Columns that share one scale of a quantised token."""

MIN_AMAX = 1e-10
"""The least absolute maximum that a scale is made from, so that a block of zeros has a finite inverse."""


class GateRule(Protocol):
    """What `route` reads of a model spec (ep.model.ModelSpec has all of it)."""

    @property
    def top_k(self) -> int: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def topk_groups(self) -> int: ...
    @property
    def routed_scaling_factor(self) -> float: ...
    @property
    def norm_topk_prob(self) -> bool: ...
    @property
    def scoring(self) -> str: ...


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to. topk_ids int32 [T, K], topk_weights float32 [T, K], best choice first."""

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


@dataclass(frozen=True)
class Experts:
    """Stacked expert weights. w13 [E, 2N, H] (gate rows, then up rows), w2 [E, H, N]."""

    w13: torch.Tensor
    w2: torch.Tensor


@dataclass(frozen=True)
class Quantized:
    """FP8 values and the float32 factors that undo the quantisation: value = q * scale_inv of its block."""

    q: torch.Tensor
    scale_inv: torch.Tensor


def gate_logits(x: torch.Tensor, gate_w: torch.Tensor) -> torch.Tensor:
    """x [T, H], gate_w [E, H] -> float32 [T, E]."""
    dtype = _compute_dtype(x)
    return F.linear(x.to(dtype), gate_w.to(dtype))


def route(logits: torch.Tensor, bias: torch.Tensor | None, rule: GateRule) -> Routing:
    """logits [T, E], bias [E] or None -> Routing, ties broken as torch.topk breaks them.

    sigmoid (DeepSeek-V3 report, arXiv 2412.19437, eq. 12-16 and section 2.1.2): chosen by sigmoid + bias, first the
    topk_groups groups with the highest sum of their two best, then top_k experts there; weighted by the sigmoid alone.
    softmax (Mixtral, arXiv 2401.04088, section 2.1): the top_k experts, weights summing to one.
    The weights hold routed_scaling_factor.
    """
    scores = logits.sigmoid() if rule.scoring == "sigmoid" else logits.softmax(dim=-1)
    choice = scores if bias is None else scores + bias.to(scores.dtype)
    if rule.num_groups > 1:
        groups = choice.unflatten(-1, (rule.num_groups, -1))
        group_scores = groups.topk(2, dim=-1).values.sum(dim=-1)
        chosen = torch.zeros_like(group_scores, dtype=torch.bool)
        chosen.scatter_(-1, group_scores.topk(rule.topk_groups, dim=-1).indices, True)
        choice = groups.masked_fill(~chosen.unsqueeze(-1), float("-inf")).flatten(-2)
    topk_ids = choice.topk(rule.top_k, dim=-1).indices
    topk_weights = scores.gather(-1, topk_ids)
    if rule.norm_topk_prob:
        topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20)
    topk_weights = topk_weights * rule.routed_scaling_factor
    return Routing(topk_ids.to(torch.int32), topk_weights.to(torch.float32))


def gating(x: torch.Tensor, gate_w: torch.Tensor, bias: torch.Tensor | None, rule: GateRule) -> Routing:
    """x [T, H], gate_w [E, H], bias [E] or None -> Routing."""
    return route(gate_logits(x, gate_w), bias, rule)


def assign_slots(
    topk_ids: torch.Tensor, slot_of: torch.Tensor, sizes: torch.Tensor, load: torch.Tensor, layer_pos: int
) -> torch.Tensor:
    """The slots of `kernels.slots.assign_slots`, with its arguments and its effect on load."""
    num_tokens, num_decode = sizes.tolist()
    num_experts = slot_of.shape[1]
    token = torch.arange(len(topk_ids), device=topk_ids.device)[:, None].expand_as(topk_ids)
    is_real = (token < num_tokens) & (topk_ids >= 0) & (topk_ids < num_experts)
    for phase, is_of_phase in enumerate((token >= num_decode, token < num_decode)):
        load[phase, layer_pos] += topk_ids[is_real & is_of_phase].bincount(minlength=num_experts)
    return torch.where(is_real, slot_of[layer_pos][topk_ids.clamp(0, num_experts - 1).long()], -1)


def quantize_blocks(
    w: torch.Tensor, block: tuple[int, int] = (128, 128), dtype: torch.dtype = torch.float8_e4m3fn
) -> Quantized:
    """w [N, K] -> q [N, K] of the FP8 dtype, scale_inv float32 [ceil(N / block[0]), ceil(K / block[1])]."""
    rows, cols = w.shape
    padded = F.pad(w.float(), (0, -cols % block[1], 0, -rows % block[0]))
    tiles = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    scale_inv = tiles.abs().amax(dim=3).amax(dim=1).clamp_min(MIN_AMAX) / torch.finfo(dtype).max
    q = _saturate(tiles / scale_inv[:, None, :, None], dtype)
    return Quantized(q.flatten(2, 3).flatten(0, 1)[:rows, :cols].contiguous(), scale_inv)


def dequantize_blocks(q: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int] = (128, 128)) -> torch.Tensor:
    """The inverse of `quantize_blocks`: float32 [N, K]."""
    rows, cols = q.shape
    scales = scale_inv.repeat_interleave(block[0], dim=0).repeat_interleave(block[1], dim=1)
    return q.float() * scales[:rows, :cols]


def quantize_tokens(x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Quantized:
    """x [T, H] -> q [T, H] of the FP8 dtype, scale_inv float32 [T, ceil(H / 128)]: a scale per 128 columns."""
    return quantize_blocks(x, (1, TOKEN_BLOCK), dtype)


def dequantize_tokens(q: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """The inverse of `quantize_tokens`: float32 [T, H]."""
    return dequantize_blocks(q, scale_inv, (1, TOKEN_BLOCK))


def expert_mlp(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, quantize_activations: bool = False
) -> torch.Tensor:
    """One expert, w2 @ (silu(gate @ x) * (up @ x)): x [T, H], w13 [2N, H], w2 [H, N] -> [T, H] in the compute dtype.

    quantize_activations rounds x and the intermediate to FP8 token blocks and back, as an FP8 kernel does.
    """
    dtype = _compute_dtype(x)
    gate, up = F.linear(_round_trip(x.to(dtype), quantize_activations), w13.to(dtype)).chunk(2, dim=-1)
    return F.linear(_round_trip(F.silu(gate) * up, quantize_activations), w2.to(dtype))


def experts_forward(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: Experts,
    quantize_activations: bool = False,
) -> torch.Tensor:
    """The weighted sum of each token's experts: x [T, H], topk_ids [T, K], topk_weights [T, K] -> [T, H] of x's dtype.

    An id outside 0..E-1 contributes nothing, so that a shard's partial is the same call with ids turned into slots.
    """
    out = torch.zeros_like(x, dtype=_compute_dtype(x))
    for expert_idx in range(experts.w13.shape[0]):
        token, choice = (topk_ids == expert_idx).nonzero(as_tuple=True)
        if len(token):
            y = expert_mlp(x[token], experts.w13[expert_idx], experts.w2[expert_idx], quantize_activations)
            out.index_add_(0, token, y * topk_weights[token, choice, None].to(y.dtype))
    return out.to(x.dtype)


def moe_forward(
    x: torch.Tensor,
    gate_w: torch.Tensor,
    bias: torch.Tensor | None,
    experts: Experts,
    rule: GateRule,
    shared: Experts | None = None,
) -> torch.Tensor:
    """The whole block: gate, routed experts and, where given, the shared expert (an `Experts` with E = 1).

    x [T, H], gate_w [E, H], bias [E] or None -> [T, H] of x's dtype.
    """
    routing = gating(x, gate_w, bias, rule)
    out = experts_forward(x, routing.topk_ids, routing.topk_weights, experts).to(_compute_dtype(x))
    if shared is not None:
        out = out + expert_mlp(x, shared.w13[0], shared.w2[0])
    return out.to(x.dtype)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _saturate(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A plain cast gives NaN beyond the largest FP8 value."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def _round_trip(x: torch.Tensor, quantize: bool) -> torch.Tensor:
    if not quantize:
        return x
    quantized = quantize_tokens(x)
    return dequantize_tokens(quantized.q, quantized.scale_inv).to(x.dtype)

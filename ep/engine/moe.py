"""The MoE block of both families: gate here, experts on the shards.

    hidden ─> gate ─> top-k ─> dispatch ─> shared expert meanwhile ─> combine ─> x routed scale ─> + shared

With tensor-parallel attention every rank gates all tokens, dispatches its share of them, and an all-gather behind
combine puts the shares together; the shared expert is vLLM's tensor-parallel layer, reduced while the shards compute.

The gate is vLLM's own layer and the rounding follows vLLM's order (routed sum to the model's dtype, then scale, then
shared), so that outputs can be compared with native vLLM token for token.

Shape legend: T tokens, H hidden, E logical experts, K top-k.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_gather

from ep.engine.gating import route_like_vllm
from ep.engine.ops import SPLITTING_OPS, bound_router, empty_sum
from ep.kernels.reference import Routing
from ep.model import ModelSpec


def _layer_pos(prefix: str) -> int:
    """Position among the MoE layers of the one that vLLM builds under `prefix` (`model.layers.<idx>.mlp`)."""
    found = re.search(r"layers\.(\d+)\.", f"{prefix}.")
    assert found is not None, prefix
    return bound_router().spec.layer_pos(int(found.group(1)))


def _route(logits: torch.Tensor, bias: torch.Tensor | None, spec: ModelSpec) -> Routing:
    """logits [T, E] -> Routing. On a GPU the weights include the routed scale, on a CPU vLLM applies it to the sum."""
    if logits.is_cuda:
        return Routing(*torch.ops.ep.route(logits, bias))
    return route_like_vllm(logits, bias, spec)


def _is_split() -> bool:
    """Whether captured graphs of the model that is built end where experts are asked."""
    return set(SPLITTING_OPS) <= set(get_current_vllm_config().compilation_config.splitting_ops or ())


def _shards_answer(
    hidden: torch.Tensor, routing: Routing, layer_pos: int, is_split: bool, shared: nn.Module | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Dispatch, run `shared` while the shards compute, combine.

    Returns (routed [T, H], shared output or None).
    """
    ids, weights = routing.topk_ids, routing.topk_weights
    routed = empty_sum(hidden) if is_split else None
    ticket = torch.ops.ep.dispatch(hidden, ids, weights, layer_pos)
    extra = shared(hidden) if shared is not None else None
    after = ticket if extra is None else extra
    if routed is None:
        routed = torch.ops.ep.combine(ticket, after, hidden, ids, weights, layer_pos)
    else:
        torch.ops.ep.combine_into(ticket, after, hidden, ids, weights, layer_pos, routed)
    if bound_router().share.size > 1:
        routed = tensor_model_parallel_all_gather(routed, dim=0)[: hidden.shape[0]]
    return routed, extra


def make_deepseek_block(native_module: Any) -> type[nn.Module]:
    """The class that stands in for `native_module.DeepseekV2MoE` (vLLM's deepseek_v2 module) while a model is built."""

    class DeepseekExperts(nn.Module):
        """DeepSeek-V3's MoE block without expert weights."""

        def __init__(
            self, config: Any, parallel_config: Any, quant_config: Any = None, prefix: str = "", **_native_options: Any
        ) -> None:
            super().__init__()
            self.spec = bound_router().spec
            self.layer_pos, self.is_split = _layer_pos(prefix), _is_split()
            self.gate = native_module.GateLinear(
                config.hidden_size,
                config.n_routed_experts,
                out_dtype=_router_dtype(native_module, config),
                prefix=f"{prefix}.gate",
            )
            bias = torch.empty(config.n_routed_experts, dtype=torch.float32)
            self.gate.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)
            self.shared_experts = None
            if config.n_shared_experts:
                self.shared_experts = native_module.DeepseekV2MLP(
                    hidden_size=config.hidden_size,
                    intermediate_size=config.moe_intermediate_size * config.n_shared_experts,
                    hidden_act=config.hidden_act,
                    quant_config=quant_config,
                    reduce_results=True,
                    prefix=f"{prefix}.shared_experts",
                )

        def forward(self, hidden_states: torch.Tensor, already_sequence_parallel: bool = False) -> torch.Tensor:
            logits, _ = self.gate(hidden_states)
            routing = _route(logits, self.gate.e_score_correction_bias, self.spec)
            routed, shared = _shards_answer(
                hidden_states, routing, self.layer_pos, self.is_split, self.shared_experts
            )
            if not logits.is_cuda:
                routed = routed * self.spec.routed_scaling_factor
            return routed if shared is None else shared + routed

    return DeepseekExperts


def make_mixtral_block(native_module: Any) -> type[nn.Module]:
    """The class that stands in for `native_module.MixtralMoE` (vLLM's mixtral module) while a model is built."""

    class MixtralExperts(nn.Module):
        """Mixtral's MoE block without expert weights."""

        # vLLM's model reads these off its last MoE block; this process holds no experts to balance.
        experts = None
        n_redundant_experts = 0

        def __init__(
            self, num_experts: int, top_k: int, hidden_size: int, prefix: str = "", **_native_options: Any
        ) -> None:
            super().__init__()
            self.spec = bound_router().spec
            self.layer_pos, self.is_split = _layer_pos(prefix), _is_split()
            self.n_routed_experts = self.n_logical_experts = self.n_physical_experts = num_experts
            self.n_local_physical_experts = num_experts
            params_dtype = _native_options.get("params_dtype")
            self.gate = native_module.GateLinear(
                hidden_size, num_experts, params_dtype=params_dtype, prefix=f"{prefix}.gate"
            )

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            hidden = hidden_states.view(-1, hidden_states.shape[-1])
            logits, _ = self.gate(hidden)
            routing = _route(logits, None, self.spec)
            routed, _ = _shards_answer(hidden, routing, self.layer_pos, self.is_split)
            return routed.view(hidden_states.shape)

    return MixtralExperts


def _router_dtype(native_module: Any, config: Any) -> torch.dtype | None:
    """The gate's output dtype as this version of vLLM chooses it (older ones have no such choice)."""
    choose = getattr(native_module, "_get_moe_router_dtype", None)
    return choose(config) if choose is not None else None

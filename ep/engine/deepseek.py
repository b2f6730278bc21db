"""DeepSeek-V3 for vLLM with its routed experts on the shards."""

from __future__ import annotations

import vllm.model_executor.models.deepseek_v2 as native
from vllm.config import VllmConfig

from ep.engine.moe import make_deepseek_block
from ep.engine.swap import swapped


class EPDeepseekV3ForCausalLM(native.DeepseekV3ForCausalLM):
    """vLLM's model; only its MoE block differs."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with swapped(native, "DeepseekV2MoE", make_deepseek_block(native)):
            super().__init__(vllm_config=vllm_config, prefix=prefix)

    def set_moe_parameters(self) -> None:
        """Tell vLLM that this process holds no experts (its own balancer and weight mappings have nothing to do)."""
        self.num_expert_groups = 1
        self.moe_layers: list[object] = []
        self.moe_mlp_layers: list[object] = []
        self.extract_moe_parameters(None)

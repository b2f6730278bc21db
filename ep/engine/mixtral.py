"""Mixtral for vLLM with its experts on the shards."""

from __future__ import annotations

import vllm.model_executor.models.mixtral as native
from vllm.config import VllmConfig

from ep.engine.moe import make_mixtral_block
from ep.engine.swap import swapped


class EPMixtralForCausalLM(native.MixtralForCausalLM):
    """vLLM's model; only its MoE block differs."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with swapped(native, "MixtralMoE", make_mixtral_block(native)):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.moe_layers: list[object] = []

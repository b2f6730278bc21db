"""Several engines of one server that do not wait for each other.

vLLM runs the engines of a data-parallel MoE model in lockstep: their experts exchange tokens in every layer, so an
engine without work computes dummy batches. Our experts are elsewhere. While engines are started and requests spread
over them, the model therefore counts as dense, whose engines vLLM leaves alone; within an engine it is what it was.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


class IndependentEngines(VerifyAndUpdateConfig):
    """vLLM's hook for what a model wants changed in the configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        if vllm_config.parallel_config.data_parallel_size == 1:
            return
        runner = vllm_config.use_v2_model_runner
        vllm_config.model_config.model_arch_config.num_experts = 0
        if vllm_config.use_v2_model_runner != runner:  # vLLM 0.25 chooses another one for dense models
            os.environ[_RUNNER] = str(int(runner))


def register_independent_engines(architecture: str) -> None:
    """Let models of this architecture have independent engines."""
    MODELS_CONFIG_MAP[architecture] = IndependentEngines


def engine_index(vllm_config: Any) -> int:
    """Which of the server's engines this configuration is for, counted from 0."""
    return int(vllm_config.parallel_config.data_parallel_index)


def as_only_engine(vllm_config: Any) -> None:
    """In an engine's own process: from here on its configuration is that of a server with one engine."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if not model.is_moe:
        model.model_arch_config = model.get_model_arch_config()
        parallel.is_moe_model = True
        # Its routers' processes see their own GPU first: no others are to be left to the engines before this one.
        parallel.data_parallel_rank_local = 0
        if getattr(parallel, "assigned_physical_gpu_ids", None) is not None:
            parallel.assigned_physical_gpu_ids = None

"""The weight loader of a router: everything but the routed experts, read once, nothing else touched on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

from ep.checkpoint import Checkpoint
from ep.engine.ops import bound_router

_EXPERTS = (".mlp.experts.", ".block_sparse_moe.experts.")
_SCALE = "_scale_inv"


class RouterLoader(BaseModelLoader):
    """Loads attention, dense, shared-expert, gate and embedding weights.

    vLLM has no block-FP8 linear layer on CPU: there FP8 weights are dequantised to bf16, one tensor at a time.
    """

    def download_model(self, model_config: ModelConfig) -> None:
        Checkpoint(model_config.model)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        load: Any = model.load_weights
        load(_router_weights(Checkpoint(model_config.model), dequantize=current_platform.is_cpu()))
        with set_default_torch_dtype(torch.float32):  # vLLM loads with the model's
            bound_router().open_slots()


def register_loader(load_format: str) -> None:
    """Make `--load-format ep` known to vLLM."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

    if load_format not in _LOAD_FORMAT_TO_MODEL_LOADER:
        register_model_loader(load_format)(RouterLoader)


def _router_weights(checkpoint: Checkpoint, dequantize: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every weight that a router holds."""
    for name in checkpoint.tensor_names():
        if any(part in name for part in _EXPERTS) or (dequantize and name.endswith(_SCALE)):
            continue
        yield name, checkpoint.read_dequantized(name) if dequantize else checkpoint.read_tensor(name)

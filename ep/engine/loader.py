"""Weight loaders: a router's, of everything but the routed experts, and one for native vLLM on weights that are made.

Made weights come into being on the model's device; stored ones are read to the CPU, nothing else is touched on disk.
"""

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


class NativeLoader(BaseModelLoader):
    """Loads every weight, for a model with its experts in vLLM.

    vLLM has no block-FP8 linear layer on CPU: there FP8 weights are dequantised to bf16, one tensor at a time.
    """

    def download_model(self, model_config: ModelConfig) -> None:
        Checkpoint(model_config.model)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        load: Any = model.load_weights
        checkpoint = Checkpoint(model_config.model)
        device = next(model.parameters()).device if checkpoint.is_made else torch.device("cpu")
        names = [name for name in checkpoint.tensor_names() if self._holds(name)]
        load(_weights(checkpoint, names, device, dequantize=current_platform.is_cpu()))

    def _holds(self, name: str) -> bool:
        return True


class RouterLoader(NativeLoader):
    """Loads attention, dense, shared-expert, gate and embedding weights."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        super().load_weights(model, model_config)
        with set_default_torch_dtype(torch.float32):
            bound_router().open_slots()

    def _holds(self, name: str) -> bool:
        return not any(part in name for part in _EXPERTS)


def register_loader(load_format: str, loader: type[BaseModelLoader]) -> None:
    """Make `--load-format` know the loader."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

    if load_format not in _LOAD_FORMAT_TO_MODEL_LOADER:
        register_model_loader(load_format)(loader)


def _weights(
    checkpoint: Checkpoint, names: list[str], device: torch.device, dequantize: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every weight that is named."""
    for name in names:
        if dequantize and name.endswith(_SCALE):
            continue
        with set_default_torch_dtype(torch.float32):  # vLLM loads with the model's
            read = checkpoint.read_dequantized if dequantize else checkpoint.read_tensor
            tensor = read(name, device)
        yield name, tensor

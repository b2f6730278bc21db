"""vLLM's plugin entry point (`vllm.general_plugins`): what a vLLM process must know before it builds our models."""

from __future__ import annotations

ARCHITECTURES = {
    "deepseek_v3": ("EPDeepseekV3ForCausalLM", "ep.engine.deepseek:EPDeepseekV3ForCausalLM"),
    "mixtral": ("EPMixtralForCausalLM", "ep.engine.mixtral:EPMixtralForCausalLM"),
}
LOAD_FORMAT = "ep"
"""Of a router: everything but the routed experts."""
NATIVE_LOAD_FORMAT = "ep_made"
"""Of vLLM's own models, experts included, where the folder holds no weights (ep/made_tensors.py)."""


def register() -> None:
    """Register the model classes, the ops, the weight loaders and the independence of engines; vLLM may call this
    several times in one process."""
    from vllm import ModelRegistry

    from ep.engine.independent import register_independent_engines
    from ep.engine.loader import NativeLoader, RouterLoader, register_loader
    from ep.engine.ops import register_ops

    register_ops()
    register_loader(LOAD_FORMAT, RouterLoader)
    register_loader(NATIVE_LOAD_FORMAT, NativeLoader)
    supported = ModelRegistry.get_supported_archs()
    for name, location in ARCHITECTURES.values():
        register_independent_engines(name)
        if name not in supported:
            ModelRegistry.register_model(name, location)

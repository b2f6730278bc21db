"""The flags with which vLLM's server is started: what makes it ours, then what the user put behind `--`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from ep.errors import OptionError
from ep.plugin import ARCHITECTURES, LOAD_FORMAT
from ep.target import Target

KV_CACHE_BYTES = 1 << 30
"""KV cache of a router on CPU unless the user says otherwise."""

_OURS = (
    "--model",
    "--served-model-name",
    "--load-format",
    "--distributed-executor-backend",
    "--scheduler-cls",
    "--hf-overrides",
    "--host",
    "--port",
)
_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def vllm_flags(
    target: Target, host: str, port: int, api_key: str | None, from_user: Sequence[str], cpu: bool
) -> list[str]:
    """cpu: whether the installed vLLM computes on the CPU. Raises OptionError for a flag that is not the user's."""
    taken = [flag for flag in from_user if flag.partition("=")[0].replace("_", "-") in _OURS]
    if taken:
        raise OptionError(f"vLLM flags after `--`: {taken[0]} is set by ep serve itself")
    overrides: dict[str, Any] = {"architectures": [ARCHITECTURES[target.spec.family][0]]}
    if cpu:
        overrides["quantization_config"] = None  # the loader dequantises: vLLM has no block-FP8 linear layer on CPU
    flags = [
        *("--model", str(target.checkpoint), "--served-model-name", target.name),
        *("--host", host, "--port", str(port)),
        *("--load-format", LOAD_FORMAT, "--hf-overrides", json.dumps(overrides)),
        *("--distributed-executor-backend", "ep.cluster.executor.RouterExecutor"),
        *("--scheduler-cls", f"ep.cluster.scheduler.{'RouterScheduler' if cpu else 'AsyncRouterScheduler'}"),
    ]
    if api_key is not None:
        flags += ["--api-key", api_key]
    if cpu and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        # vLLM's default takes nine tenths of the machine's memory, which the shards share.
        flags += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
    return flags + list(from_user)


def check_supported(args: Any, cpu: bool) -> None:
    """args: what vLLM's parser made of the flags. Raises OptionError for what this version of ep does not serve."""
    for name in _SIZES:
        if getattr(args, name, 1) != 1:
            raise OptionError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 1, there is one router")

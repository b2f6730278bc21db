"""The flags with which vLLM's server is started: what makes it ours, then what the user put behind `--`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import zip_longest
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
_DATA_PARALLEL = ("--data-parallel", "-dp")
_TENSOR_PARALLEL = ("--tensor-parallel-size", "-tp")


def tensor_parallel_size(from_user: Sequence[str]) -> int:
    """Ranks of each router's attention, read before vLLM and its parser are imported; check_supported compares."""
    size = 1
    for flag, following in zip_longest(from_user, from_user[1:], fillvalue=""):
        name, _, value = flag.partition("=")
        if name.replace("_", "-") in _TENSOR_PARALLEL:
            value = value or following
            if not value.isdecimal() or int(value) < 1:
                raise OptionError(f"vLLM flags after `--`: {name} {value}: expected a number from 1 on")
            size = int(value)
    return size


def check_free(from_user: Sequence[str]) -> None:
    """Raises OptionError for a flag that is not the user's, before anything is imported or started."""
    for flag in from_user:
        name = flag.partition("=")[0].replace("_", "-")
        if name in _OURS:
            raise OptionError(f"vLLM flags after `--`: {flag} is set by ep serve itself")
        if name.startswith(_DATA_PARALLEL):
            raise OptionError(f"vLLM flags after `--`: {flag} is set by ep serve itself: give --routers N before `--`")


def vllm_flags(
    target: Target, host: str, port: int, api_key: str | None, routers: int, from_user: Sequence[str], cpu: bool
) -> list[str]:
    """routers: engines behind the one server. cpu: whether the installed vLLM computes on the CPU. from_user: what
    check_free lets pass."""
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
    if routers > 1:
        flags += ["--data-parallel-size", str(routers)]
    if api_key is not None:
        flags += ["--api-key", api_key]
    if cpu and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        # vLLM's default takes nine tenths of the machine's memory, which the shards share.
        flags += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
    return flags + list(from_user)


def check_supported(args: Any, routers: int, ranks: int) -> None:
    """args: what vLLM's parser made of the flags. ranks: tensor_parallel_size of the same flags. Raises OptionError for
    what this version of ep does not serve."""
    pipeline, tensor, data = (getattr(args, f"{kind}_parallel_size") for kind in ("pipeline", "tensor", "data"))
    if pipeline != 1:
        raise OptionError(f"--pipeline-parallel-size {pipeline}: expected 1, every router has all layers")
    if args.enable_expert_parallel:
        raise OptionError("--enable-expert-parallel: vLLM holds no experts here, expected --shards N before `--`")
    if args.api_server_count is not None and args.api_server_count < 1:
        raise OptionError(f"--api-server-count {args.api_server_count}: expected at least 1")
    if tensor != ranks:
        raise OptionError(f"tensor_parallel_size {tensor}: say --tensor-parallel-size N after `--`, spelt out")
    if data != routers:
        raise OptionError(f"data_parallel_size {data}: say --routers N before `--`")

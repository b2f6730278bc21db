"""vLLM's own OpenAI server in front of our routers."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvloop
from pydantic import ValidationError
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from ep.engine.ops import SPLITTING_OPS
from ep.engine.swap import swapped
from ep.errors import OptionError

try:
    from vllm.exceptions import GenerationError
except ImportError:  # before vLLM 0.32
    from vllm.entrypoints.openai.engine.protocol import GenerationError

try:
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
except ImportError:  # before vLLM 0.32
    from vllm.entrypoints.openai import api_server as entry
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args


def parse_flags(flags: Sequence[str]) -> argparse.Namespace:
    """vLLM's server flags as its own parser reads them. Raises OptionError with the parser's one line."""
    parser = make_arg_parser(_Parser(prog="vllm", add_help=False))
    args = parser.parse_args(list(flags))
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise OptionError(f"vLLM flags after `--`: {error}") from None
    return args


def split_at_experts(args: argparse.Namespace, whole_steps: bool) -> None:
    """Leave dispatch and combine out of the graphs of parts of a step, for the host has a part in every layer, or what
    is no graph would be launched behind a wait (IpcTransport.combine). whole_steps: graphs of whole steps have them.

    Raises OptionError for a graph mode that captures whole steps where they may not.
    """
    config = args.compilation_config
    mode = config.cudagraph_mode
    name = getattr(mode, "name", str(mode))
    if whole_steps:
        if mode is not None and "PIECEWISE" not in name:
            return
    elif mode is not None and name not in ("NONE", "PIECEWISE"):
        raise OptionError(f"cudagraph_mode {mode}: --transport socket needs PIECEWISE or NONE, whole steps need ipc")
    if config.splitting_ops is None:
        caches = ["vllm::unified_kv_cache_update", "vllm::unified_mla_kv_cache_update"]  # as vLLM adds them itself
        config.splitting_ops = [*config._attention_ops, *caches]
    config.splitting_ops += SPLITTING_OPS
    if mode is None and not whole_steps:
        config.cudagraph_mode = CUDAGraphMode.PIECEWISE


def blame_flags(error: Exception) -> None:
    """Raises OptionError, in a line, if vLLM would not make a configuration of its flags: pydantic says so in several,
    the last of which is an address."""
    if isinstance(error, ValidationError):
        said = "; ".join(one["msg"] for one in error.errors())
        raise OptionError(f"vLLM flags after `--`: {error.title}: {' '.join(said.split())}") from error


def is_cpu() -> bool:
    """Whether the installed vLLM computes attention on the CPU."""
    return current_platform.is_cpu()


def run(args: argparse.Namespace, metrics: Path | None) -> None:
    """Serve until SIGINT or SIGTERM. metrics: the file with the cluster's, where API servers have processes of their
    own; None for one in this process."""
    if metrics is None:
        _naming_errors(lambda: uvloop.run(entry.run_server(args)))
    else:
        from ep.engine import api_servers

        api_servers.run(args, metrics, _naming_errors)


def _naming_errors(serve: Callable[[], Any]) -> None:
    """vLLM's server says "Internal server error" for a request that its engine ended with an error; say which."""
    build = entry.build_async_engine_client

    @asynccontextmanager
    async def build_naming_errors(*positional: Any, **options: Any) -> AsyncIterator[Any]:
        async with build(*positional, **options) as engine:
            engine.generate = _or_raise(engine.generate)
            yield engine

    with swapped(entry, "build_async_engine_client", build_naming_errors):
        serve()


def _or_raise(generate: Any) -> Any:
    async def generate_or_raise(*positional: Any, **options: Any) -> AsyncIterator[Any]:
        async for output in generate(*positional, **options):
            for completion in output.outputs:
                if completion.finish_reason == "error" and completion.stop_reason:
                    raise GenerationError(str(completion.stop_reason))
            yield output

    return generate_or_raise


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> Any:
        raise OptionError(f"vLLM flags after `--`: {message}")

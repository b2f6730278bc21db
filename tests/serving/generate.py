"""Greedy tokens of vLLM in a process of its own: native, or with its experts on shards.

One engine serves all shard counts and transports: only the router that its ops are bound to changes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ep.checkpoint import Checkpoint
from ep.ipc_options import IpcOptions
from ep.ipc_router import IpcRouter
from ep.ipc_setup import message_shape, open_device
from ep.ipc_shard import IpcShard
from ep.placement import Placement, even_split
from ep.plugin import ARCHITECTURES, LOAD_FORMAT
from ep.router import Router
from ep.shard import Shard
from ep.transport.base import spec_fingerprint
from ep.transport.handshake import Greeting
from ep.transport.ipc import IpcTransport
from ep.transport.local import LocalTransport
from ep.transport.mailbox import MailboxBlock
from ep.transport.sockets import SocketTransport
from tests.unit.shards import KEY, NODE, ShardProcess

NUM_TOKENS = 64
ANY_NUMBER = 1 << 30
"""Of tokens: nobody tells the router of vLLM's steps here, and outside of steps it asks nobody."""


@dataclass(frozen=True)
class Continuation:
    """tokens of one prompt; gaps: the difference of the two best log probabilities at each."""

    tokens: list[int]
    gaps: list[float]


@dataclass(frozen=True)
class Case:
    """num_alone: None runs all prompts at once, at most 16 at a time; else so many of them, one after the other."""

    num_shards: int
    transport: str
    num_alone: int | None = None


def native(checkpoint: Path, prompts: Sequence[list[int]], **options: Any) -> list[Continuation]:
    """What native vLLM says on bf16 weights. options: further ones of vLLM's LLM, here and in `routed`."""
    return _in_process(_native, str(checkpoint), list(prompts), options)


def routed(
    checkpoint: Path, prompts: Sequence[list[int]], cases: Sequence[Case], folder: Path, **options: Any
) -> list[list[list[int]]]:
    """Tokens by case and prompt."""
    return _in_process(_routed, str(checkpoint), list(prompts), list(cases), str(folder), options)


def _in_process(call: Callable[..., Any], *arguments: Any) -> Any:
    """vLLM sets up its whole process; this keeps it out of the test's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def _native(checkpoint: str, prompts: list[list[int]], options: dict[str, Any]) -> list[Continuation]:
    engine = _engine(model=checkpoint, **options)
    outputs = _generate(engine, prompts, logprobs=2)
    return [Continuation(list(output.token_ids), [_gap(step) for step in output.logprobs]) for output in outputs]


def _routed(
    checkpoint: str, prompts: list[list[int]], cases: list[Case], folder: str, options: dict[str, Any]
) -> list[list[list[int]]]:
    from ep.engine.ops import bind_router

    spec = Checkpoint(checkpoint).spec
    engine: Any = None
    found = []
    for case_idx, case in enumerate(cases):
        with ExitStack() as stack:
            router = _router(checkpoint, case, Path(folder) / str(case_idx), stack)
            stack.callback(router.close)
            bind_router(router)
            if engine is None:
                overrides = {"architectures": [ARCHITECTURES[spec.family][0]], "quantization_config": None}
                engine = _engine(model=checkpoint, load_format=LOAD_FORMAT, hf_overrides=overrides, **options)
            with router.step(ANY_NUMBER, 1) if isinstance(router, IpcRouter) else nullcontext():
                outputs = _generate(engine, prompts, case.num_alone)
            router.take_load()
            found.append([list(output.token_ids) for output in outputs])
            assert all(link.requests for link in router.stats()), "a shard was never asked"
    return found


def _router(checkpoint: str, case: Case, folder: Path, stack: ExitStack) -> Router | IpcRouter:
    read = Checkpoint(checkpoint)
    spec = read.spec
    placement = even_split(spec.num_moe_layers, spec.num_experts, case.num_shards)
    if case.transport == "local":
        shards = [Shard.load(read, placement, shard_idx) for shard_idx in range(case.num_shards)]
        return Router(spec, placement, LocalTransport(shards, spec.hidden_size, spec.top_k))
    if case.transport == "ipc":
        return _ipc_router(checkpoint, placement, stack)
    folder.mkdir(parents=True, mode=0o700)
    processes = [
        ShardProcess.start(folder, _load_shard, checkpoint, shard_idx, case.num_shards)
        for shard_idx in range(case.num_shards)
    ]
    for process in processes:
        stack.callback(process.stop)
    greeting = Greeting("test", spec_fingerprint(spec), spec.hidden_size, 1024, spec.top_k)
    node_id = NODE if case.transport == "unix" else "another node"
    return Router(spec, placement, SocketTransport([p.endpoint for p in processes], greeting, KEY, node_id))


def _ipc_router(checkpoint: str, placement: Placement, stack: ExitStack) -> IpcRouter:
    """Its shards are threads of this process."""
    read, device = Checkpoint(checkpoint), torch.device("cpu")
    options = IpcOptions(f"test-{os.getpid()}", 1, "bf16", "f32")
    shards = [IpcShard(Shard.load(read, placement, idx), options, device) for idx in range(placement.num_shards)]
    for shard in shards:
        stack.callback(shard.close)
    block = MailboxBlock.open(options.block, options.num_routers, placement.num_shards)
    stack.callback(block.close)
    message = message_shape(read.spec, options, device)
    transport = IpcTransport(open_device(device), block, 0, message, placement)

    def meet() -> None:
        for shard_idx, shard in enumerate(shards):
            transport.replace(shard_idx, shard.attach(transport.handles))

    router = IpcRouter(read.spec, placement, transport, open_device(device), meet)
    router.open_slots()
    return router


def _load_shard(checkpoint: str, shard_idx: int, num_shards: int) -> Shard:
    read = Checkpoint(checkpoint)
    return Shard.load(read, even_split(read.spec.num_moe_layers, read.spec.num_experts, num_shards), shard_idx)


def _engine(**options: Any) -> Any:
    os.environ.update(
        OMP_NUM_THREADS="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
    )
    from vllm import LLM

    return LLM(max_model_len=512, max_num_seqs=16, kv_cache_memory_bytes=1 << 28, seed=0, **options)


def _generate(
    engine: Any, prompts: list[list[int]], num_alone: int | None = None, logprobs: int | None = None
) -> list[Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=logprobs)
    batches = [prompts] if num_alone is None else [[prompt] for prompt in prompts[:num_alone]]
    outputs = []
    for batch in batches:
        engine.reset_prefix_cache()  # or a case would read the KV of the one before
        inputs = [{"prompt_token_ids": prompt} for prompt in batch]
        outputs += [result.outputs[0] for result in engine.generate(inputs, sampling, use_tqdm=False)]
    return outputs


def _gap(step: Any) -> float:
    best, second = sorted((entry.logprob for entry in step.values()), reverse=True)[:2]
    return best - second

"""One router of `ep bench joining`, with a shard in its process: decode steps in which products stand for all but the
experts.

Shape legend: T tokens of a step, H hidden, K choices per token, E logical experts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection

import torch

from ep.bench.ipc_shards import ShardSetup, ThreadShard, answer_calls
from ep.bench.moe_case import random_weights
from ep.compute.ipc_experts import IpcExperts
from ep.ipc_options import IpcOptions
from ep.ipc_setup import limits, message_shape, whole_rows
from ep.kernels.devices import current_device
from ep.kernels.fused_moe import ExpertShape
from ep.model import ModelSpec
from ep.placement import even_split
from ep.transport.ipc import IpcTransport
from ep.transport.ipc_device import GpuDevice
from ep.transport.ipc_handles import RouterHandles, ShardHandles
from ep.transport.mailbox import MailboxBlock

COLUMNS, NUM_MATRICES, TIMED = 8192, 8, 64
"""Of the matrices that products read, which are too many for a cache; and products that are timed."""


@dataclass(frozen=True)
class JoiningSetup:
    """spec: of the model, num_layers MoE layers of which are run. router_idx: also the shard beside it. gpu: of both.
    between_us, rest_us: what products take from one MoE layer to the next, and from the last one of a step to the first
    one of the next."""

    block: str
    spec: ModelSpec
    num_layers: int
    num_routers: int
    router_idx: int
    gpu: int
    between_us: float
    rest_us: float


@dataclass(frozen=True)
class JoiningRun:
    """Of one router. step_ms: of every step. messages: that its shard answered; joined: of those, that a job answered
    together with others."""

    step_ms: tuple[float, ...]
    messages: int
    joined: int


class JoiningRouter:
    """Made in its own process."""

    def __init__(self, setup: JoiningSetup) -> None:
        torch.cuda.set_device(setup.gpu)
        spec, place = setup.spec, torch.device("cuda", setup.gpu)
        self._setup, self._place, self._device = setup, place, current_device(setup.gpu)
        dtype = torch.bfloat16 if spec.quant_block is None else self._device.fp8_dtype or torch.bfloat16
        num_slots = spec.num_experts // setup.num_routers
        self._weights = random_weights(
            ExpertShape(setup.num_layers, num_slots, spec.hidden_size, spec.moe_intermediate_size, dtype), place
        )
        self._stream = torch.cuda.Stream()
        size = (spec.hidden_size, COLUMNS)
        self._matrices = [torch.randn(size, device=place, dtype=torch.bfloat16) for _ in range(NUM_MATRICES)]

    def start(self, waits: bool) -> RouterHandles:
        """waits: whether jobs wait for routers (kernels/p2p.py `take`)."""
        setup, spec = self._setup, self._setup.spec
        block, num_routers, router_idx = f"{setup.block}-{waits}", setup.num_routers, setup.router_idx
        options = IpcOptions(block, num_routers, "fp8", "bf16")
        message = message_shape(spec, options, self._place)
        layer_bytes = self._weights.nbytes / setup.num_layers if waits else 0.0
        bounds = limits(self._place, True, layer_bytes, whole_rows(spec))
        experts = IpcExperts(self._weights, self._device, spec.top_k, bounds.job_tokens, num_routers, True)
        self._shard = ThreadShard(
            ShardSetup(
                block, num_routers, num_routers, router_idx, setup.gpu, message, setup.num_layers, bounds,
                lambda _: experts,
            )
        )  # fmt: skip
        self._block = MailboxBlock.open(block, num_routers, num_routers)
        placement = even_split(setup.num_layers, spec.num_experts, num_routers)
        with torch.cuda.stream(self._stream):
            self._router = IpcTransport(GpuDevice(setup.gpu), self._block, router_idx, message, placement)
            return self._router.handles

    def attach(self, routers: Sequence[RouterHandles]) -> list[ShardHandles]:
        return [self._shard.attach(one) for one in routers]

    def connect(self, shards: Sequence[ShardHandles]) -> None:
        with torch.cuda.stream(self._stream):
            for shard in shards:
                self._router.replace(shard.shard_idx, shard)
            self._router.warm_up()

    def prepare(self, num_tokens: int) -> None:
        """Captures a step of so many tokens, while no router sends anything."""
        setup, spec, place = self._setup, self._setup.spec, self._place
        with torch.cuda.stream(self._stream):
            hidden = torch.randn(num_tokens, spec.hidden_size, device=place).bfloat16()
            ids = torch.rand(num_tokens, spec.num_experts, device=place).topk(spec.top_k).indices.int()
            weights = torch.rand(num_tokens, spec.top_k, device=place)
            out = torch.empty(num_tokens, COLUMNS, device=place, dtype=torch.bfloat16)

            def products(num: int) -> None:
                for product in range(num):
                    torch.matmul(hidden, self._matrices[product % NUM_MATRICES], out=out)

            products(NUM_MATRICES)
            start = _event()
            products(TIMED)
            end = _event()
            end.synchronize()
            each_us = start.elapsed_time(end) / TIMED * 1e3
            rest, between = round(setup.rest_us / each_us), round(setup.between_us / each_us)

            def step() -> None:
                for layer_pos in range(setup.num_layers):
                    products(between if layer_pos else rest)
                    self._router.dispatch(layer_pos, hidden, ids, weights)
                    self._router.combine()

            self._operands = (hidden, ids, weights, out)  # the graph's, which does not keep them
            self._replay = GpuDevice(setup.gpu).capture(step)
        self._num_tokens = num_tokens

    def measure(self, seconds: float, stall_ms: float, stall_every: int, seed: int) -> JoiningRun:
        """Steps for so long, launched one ahead as vLLM does. Its host stalls for stall_ms once in stall_every steps,
        at random."""
        pick, router, num_tokens = random.Random(seed), self._router, self._num_tokens
        with torch.cuda.stream(self._stream):
            before, events, began = self._shard.stats(), [_event()], time.monotonic()
            while time.monotonic() - began < seconds:
                router.begin_step(num_tokens, num_tokens, len(events))
                self._replay()
                events.append(_event())
                events[-2].synchronize()
                if stall_ms and not pick.randrange(stall_every):
                    time.sleep(stall_ms / 1e3)
            self._stream.synchronize()
            router.check()
        after = self._shard.stats()
        took = [start.elapsed_time(end) for start, end in pairwise(events)]
        return JoiningRun(tuple(took), after.messages - before.messages, after.joined - before.joined)

    def stop(self) -> None:
        """After all routers are done."""
        self._router.close()
        self._shard.stop()
        self._block.close()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def serve(setup: JoiningSetup, pipe: Connection) -> None:
    """In a process of its own: a router that the other end calls."""
    router = JoiningRouter(setup)
    pipe.send(None)
    answer_calls(router, pipe)

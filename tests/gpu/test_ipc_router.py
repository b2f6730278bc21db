"""A router over ipc on a real GPU, with real experts: slots in its process, and a shard on a stream of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ep.checkpoint import SlotWeights
from ep.ipc_options import IpcOptions
from ep.ipc_router import IpcRouter
from ep.ipc_setup import message_shape, open_device
from ep.ipc_shard import IpcShard
from ep.kernels import reference
from ep.placement import even_split
from ep.shard import Shard
from ep.transport.ipc import IpcTransport
from ep.transport.mailbox import MailboxBlock
from tests.gpu.test_shard import EXACT, LAYERS, SLOTS, TOP_K, dense, error, make_layers, make_spec

PLACEMENT = even_split(LAYERS, SLOTS, 2)


@dataclass
class Rig:
    """experts: of each layer, as float64. family: of the model."""

    router: IpcRouter
    experts: list[reference.Experts]
    family: str
    hidden: int


@pytest.fixture(params=[("deepseek_v3", "fp8"), ("deepseek_v3", "bf16"), ("mixtral", "bf16")], ids="-".join)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    family, rows = request.param
    spec, layers, place = make_spec(family), make_layers(family), torch.device("cuda", 0)

    def shard(shard_idx: int) -> Shard:
        held = slice(shard_idx * SLOTS // 2, (shard_idx + 1) * SLOTS // 2)
        mine = [
            SlotWeights(*(None if t is None else t[held] for t in (w.w13, w.w2, w.w13_scale, w.w2_scale)))  # type: ignore[arg-type]
            for w in layers
        ]
        return Shard(spec, PLACEMENT, shard_idx, mine, place, max_pass_tokens=256)

    options = IpcOptions(f"test-{time.time_ns()}", 1, rows, "f32")
    with ExitStack() as stack:
        shards = [IpcShard(shard(shard_idx), options, place, is_hosted=True) for shard_idx in range(2)]
        for each in shards:
            stack.callback(each.close)
        block = MailboxBlock.open(options.block, 1, 2)
        stack.callback(block.close)
        message, device = message_shape(spec, options, place), open_device(place)
        transport = IpcTransport(device, block, 0, message, PLACEMENT, deadline_s=5.0)

        def open_slots() -> None:
            for shard_idx, each in enumerate(shards):
                transport.replace(shard_idx, each.attach(transport.handles))

        router = IpcRouter(spec, PLACEMENT, transport, device, open_slots)
        stack.callback(router.close)
        router.open_slots()
        yield Rig(router, [dense(layer) for layer in layers], family, spec.hidden_size)


def operands(num_tokens: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.rand(num_tokens, SLOTS, device="cuda").topk(TOP_K).indices.int()
    return torch.randn(num_tokens, hidden, device="cuda").bfloat16(), ids, torch.rand(num_tokens, TOP_K, device="cuda")


def check(rig: Rig, layer: int, out: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
    x, ids, weights, out = (tensor.cpu() for tensor in (x, ids, weights, out))
    exact = reference.experts_forward(x.double(), ids, weights, rig.experts[layer])
    assert torch.isfinite(out).all() and error(out, exact) < EXACT[rig.family]


@pytest.mark.parametrize("num_tokens", [1, 3, 64, 2100])
def test_small_batches_of_any_size(rig: Rig, num_tokens: int) -> None:
    x, ids, weights = operands(num_tokens, rig.hidden)
    with rig.router.step(num_tokens, num_tokens) as step:
        outs = []
        for layer in range(LAYERS):
            rig.router.dispatch(layer, x, ids, weights)
            outs.append(rig.router.combine(layer))
    torch.cuda.current_stream().synchronize()
    assert rig.router.failure(step) is None
    for layer, out in enumerate(outs):
        check(rig, layer, out, x, ids, weights)


def test_small_steps_from_one_captured_graph(rig: Rig) -> None:
    """Operands, real tokens and counts change between replays, nothing is launched by the host."""
    x, ids, weights = operands(16, rig.hidden)
    router, stream = rig.router, torch.cuda.Stream()

    def layers() -> list[torch.Tensor]:
        outs = []
        for layer in range(LAYERS):
            router.dispatch(layer, x, ids, weights)
            outs.append(router.combine(layer))
        return outs

    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        layers()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outs = layers()
        wanted = np.zeros((2, LAYERS, SLOTS), dtype=np.int64)
        for turn, num_tokens in enumerate((16, 5, 1)):
            for tensor, fresh in zip((x, ids, weights), operands(16, rig.hidden), strict=True):
                tensor.copy_(fresh)
            with router.step(num_tokens, num_tokens if turn else 1) as step:
                graph.replay()
            stream.synchronize()
            assert router.failure(step) is None
            for layer, out in enumerate(outs):
                real = slice(0, num_tokens)
                check(rig, layer, out[real], x[real], ids[real], weights[real])
            counts = np.bincount(ids[:num_tokens].cpu().numpy().ravel(), minlength=SLOTS)
            wanted[int(turn > 0)] += counts
        assert np.array_equal(router._transport.take_carried().pairs, wanted)

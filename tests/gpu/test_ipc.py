"""The data plane between GPUs on one: shards in processes of their own by IPC handles, and as threads of this one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import torch

from ep.bench.ipc_shards import BenchShard, ProcessShard, ShardSetup, ThreadShard
from ep.compute.ipc_experts import IpcExperts
from ep.errors import DeadlineError, ShardFailedError, ShardLostError
from ep.ipc_jobs import IpcLimits
from ep.ipc_server import IpcServer
from ep.kernels import reference
from ep.kernels.devices import current_device
from ep.kernels.p2p_layout import MessageShape
from ep.placement import Placement, even_split
from ep.transport.ipc import IpcTransport
from ep.transport.ipc_device import GpuDevice
from ep.transport.mailbox import MailboxBlock
from tests.gpu.ipc_shard import ScaleExperts

HIDDEN, TOP_K, EXPERTS, LAYERS, MAX_TOKENS = 1024, 4, 8, 3, 64
LIMITS = IpcLimits(job_tokens=64, graph_tokens=16, depth=4, linger_s=5e-3, patience=1 << 13)


@dataclass
class Node:
    """The mailboxes, two shards, and the streams of two routers."""

    block: MailboxBlock
    message: MessageShape
    shards: list[BenchShard]
    routers: list[IpcTransport]
    streams: list[torch.cuda.Stream]
    stack: ExitStack

    def start_shard(self, shard_idx: int, in_process: bool) -> BenchShard:
        setup = ShardSetup(
            self.block.path.name.removeprefix("ep-mailbox-"), 2, 2, shard_idx, 0, self.message, LAYERS, LIMITS,
            ScaleExperts,
        )  # fmt: skip
        shard = ThreadShard(setup) if in_process else ProcessShard(setup)
        self.stack.callback(shard.stop)
        return shard

    def connect(self, shard_idx: int, shard: BenchShard) -> None:
        for router, stream in zip(self.routers, self.streams, strict=True):
            with torch.cuda.stream(stream):
                router.replace(shard_idx, shard.attach(router.handles))


@pytest.fixture(params=[torch.bfloat16, None], ids=["bf16", "fp8"])
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    """Shard 0 is a thread here, shard 1 a process of its own."""
    dtype = request.param or current_device().fp8_dtype
    if dtype is None:
        pytest.skip("no FP8 matrix units")
    message = MessageShape(MAX_TOKENS, HIDDEN, TOP_K, dtype, torch.float32)
    with ExitStack() as stack:
        block = MailboxBlock.open(f"test-{time.time_ns()}", 2, 2)
        stack.callback(block.close)
        node = Node(block, message, [], [], [torch.cuda.Stream() for _ in range(2)], stack)
        node.shards = [node.start_shard(0, in_process=True), node.start_shard(1, in_process=False)]
        for router_idx, stream in enumerate(node.streams):
            with torch.cuda.stream(stream):
                placement = even_split(LAYERS, EXPERTS, 2)
                router = IpcTransport(GpuDevice(0), block, router_idx, message, placement, deadline_s=2.0)
            node.routers.append(router)
            stack.callback(router.close)
        for shard_idx, shard in enumerate(node.shards):
            node.connect(shard_idx, shard)
        yield node


class Step:
    """All layers of one router in one captured graph; the operands may change between replays."""

    def __init__(self, router: IpcTransport, stream: torch.cuda.Stream, num_tokens: int) -> None:
        self._router, self._stream = router, stream
        with torch.cuda.stream(stream):
            self.hidden = torch.zeros(num_tokens, HIDDEN, device="cuda").bfloat16()
            self.ids = torch.zeros(num_tokens, TOP_K, dtype=torch.int32, device="cuda")
            self.weights = torch.zeros(num_tokens, TOP_K, device="cuda")
            self.change()
            self._launch()  # compiles
            stream.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.outs = self._launch()

    def _launch(self) -> list[torch.Tensor]:
        outs = []
        for layer_pos in range(LAYERS):
            self._router.dispatch(layer_pos, self.hidden, self.ids, self.weights)
            outs.append(self._router.combine())
        return outs

    def change(self) -> None:
        with torch.cuda.stream(self._stream):
            self.hidden.normal_()
            self.ids.copy_(torch.rand(len(self.ids), EXPERTS, device="cuda").topk(TOP_K).indices)
            self.weights.uniform_()
            self._stream.synchronize()

    def replay(self) -> None:
        with torch.cuda.stream(self._stream):
            self.graph.replay()

    def finish(self) -> None:
        self._stream.synchronize()
        self._router.check()

    def verify(self) -> None:
        hidden = self.hidden.float()
        if self._router.message.quantized:
            tokens = reference.quantize_tokens(self.hidden.cpu(), self._router.message.dtype)
            hidden = reference.dequantize_tokens(tokens.q, tokens.scale_inv).cuda()
        for layer_pos, out in enumerate(self.outs):
            scale = ((1 + self.ids) * (2 + layer_pos) * self.weights).sum(1, keepdim=True)
            torch.testing.assert_close(out.float(), hidden * scale, rtol=1e-2, atol=1e-2)


def test_small_steps_of_two_routers_at_once(node: Node) -> None:
    steps = [Step(node.routers[0], node.streams[0], 13), Step(node.routers[1], node.streams[1], 40)]
    for _ in range(3):
        for step in steps:
            step.change()
        for step in steps:
            step.replay()
        for step in steps:
            step.finish()
            step.verify()
    node.routers[0].begin_step(5, 0)
    steps[0].replay()
    steps[0].finish()
    assert all((out[5:] == 0).all() and (out[:5] != 0).any() for out in steps[0].outs)
    for shard in node.shards:
        assert shard.stats().messages == 2 * 4 * LAYERS + LAYERS
        assert shard.stats().refused == 0


def test_a_killed_shard_ends_the_graph_within_a_second_and_its_successor_serves_it(node: Node) -> None:
    router, stream = node.routers[0], node.streams[0]
    step = Step(router, stream, 24)
    step.replay()
    step.finish()
    killed = node.shards[1]
    assert isinstance(killed, ProcessShard)
    killed.kill()
    start = time.monotonic()
    step.replay()
    stream.synchronize()
    took = time.monotonic() - start
    with pytest.raises(ShardLostError, match=r"shard 1: its process \d+ ended"):
        router.check()
    assert took < 1.0
    print(f"back {took * 1e3:.0f} ms after the launch")
    size = 2048
    a = torch.randn(size, size, device="cuda")
    torch.testing.assert_close((a @ torch.eye(size, device="cuda")), a)  # the GPU is usable
    node.connect(1, node.start_shard(1, in_process=False))
    with torch.cuda.stream(stream):
        router.reset()
    step.change()
    step.replay()  # the same graph
    step.finish()
    step.verify()


def test_a_graph_follows_the_placement(node: Node) -> None:
    router, stream = node.routers[0], node.streams[0]
    step = Step(router, stream, 8)
    with torch.cuda.stream(stream):
        router.set_placement(Placement(3, EXPERTS, even_split(LAYERS, EXPERTS, 2).slots))
    step.replay()
    stream.synchronize()
    with pytest.raises(ShardFailedError, match="does not serve placement generation 3"):
        router.check()
    swapped = even_split(LAYERS, EXPERTS, 2).slots[:, ::-1]
    with torch.cuda.stream(stream):
        router.reset()
        router.set_placement(Placement(0, EXPERTS, swapped))  # ScaleExperts keep theirs: the experts trade places
    step.replay()
    step.finish()
    ids = step.ids.clone()
    step.ids.copy_((ids + EXPERTS // 2) % EXPERTS)
    step.verify()


def test_a_silent_shard_is_late(node: Node) -> None:
    """Its process lives, but its thread does not: the deadline passes."""
    router, stream = node.routers[0], node.streams[0]
    step = Step(router, stream, 8)
    node.shards[0]._server._is_stopping = True  # type: ignore[attr-defined]
    start = time.monotonic()
    step.replay()
    stream.synchronize()
    assert 2.0 < time.monotonic() - start < 3.0
    with pytest.raises(DeadlineError, match="shard 0: no answer within 2 s"):
        router.check()


@pytest.mark.parametrize("is_quantized", [False, True])
def test_real_experts_behind_the_mailbox(is_quantized: bool) -> None:
    from tests.unit.kernel_cases import make_case

    device = current_device()
    dtype = device.fp8_dtype if is_quantized else torch.bfloat16
    if dtype is None:
        pytest.skip("no FP8 matrix units")
    case = make_case(dtype, num_layers=2, num_slots=4, hidden=256)
    weights = type(case.weights)(
        **{name: None if value is None else value.cuda() for name, value in vars(case.weights).items()}
    )
    message = MessageShape(32, 256, 2, dtype, torch.float32)
    limits = IpcLimits(job_tokens=32, graph_tokens=8)
    block = MailboxBlock.open(f"test-{time.time_ns()}", 1, 1)
    server = IpcServer(
        GpuDevice(0, own_stream=True), block, 0, message, 2, IpcExperts(weights, device, 2, 32, 1), lambda: (0,), limits
    )
    server.start()
    with torch.cuda.stream(torch.cuda.Stream()):
        router = IpcTransport(GpuDevice(0), block, 0, message, even_split(2, 4, 1))
        router.replace(0, server.attach(router.handles))
        for num_tokens in (1, 7, 32):
            x = torch.randn(num_tokens, 256, device="cuda").bfloat16()
            ids = torch.rand(num_tokens, 4, device="cuda").topk(2).indices.int()
            topk_weights = torch.rand(num_tokens, 2, device="cuda")
            for layer_pos in range(2):
                router.dispatch(layer_pos, x, ids, topk_weights)
                out = router.combine()
                torch.cuda.current_stream().synchronize()
                router.check()
                experts = case.dense[layer_pos]
                expected = reference.experts_forward(x.cpu().float(), ids.cpu(), topk_weights.cpu(), experts)
                error = (out.cpu().float() - expected).norm() / expected.norm()
                assert error < (0.07 if is_quantized else 0.01)
        router.close()
    server.stop()
    block.close()

"""Shards and routers of the ipc data plane on simulated GPUs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch

from ep.ipc_jobs import IpcLimits
from ep.ipc_server import IpcServer
from ep.placement import even_split
from ep.transport.ipc import IpcTransport
from ep.transport.mailbox import MailboxBlock
from tests.unit.simulated import SimulatedDevice, SimulatedExperts, factors, message_shape

LAYERS, EXPERTS = 3, 8
PLACEMENT = even_split(LAYERS, EXPERTS, 2)
LIMITS = IpcLimits(job_tokens=16, graph_tokens=8)
AHEAD = IpcLimits(job_tokens=16, graph_tokens=8, depth=3, linger_s=1.0, patience=4)
"""Jobs wait on the device for messages; time stands still."""
_names = count()


@contextmanager
def open_block() -> Iterator[MailboxBlock]:
    """Of three routers and two shards."""
    block = MailboxBlock.open(f"test-{time.time_ns()}-{next(_names)}", 3, 2)
    yield block
    block.close()


class Rig:
    """Shards and routers of one block, connected pairwise."""

    def __init__(
        self, block: MailboxBlock, num_routers: int = 1, deadline_s: float = 30.0, limits: IpcLimits = LIMITS
    ) -> None:
        self.block, self.limits, self.now = block, limits, 0.0
        self.served = {0}
        self.shard_devices = [SimulatedDevice() for _ in range(2)]
        self.servers = [self.make_server(shard_idx) for shard_idx in range(2)]
        self.devices = [SimulatedDevice() for _ in range(num_routers)]
        self.routers = [
            IpcTransport(device, block, router_idx, message_shape(), PLACEMENT, deadline_s=deadline_s)
            for router_idx, device in enumerate(self.devices)
        ]
        for router in self.routers:
            for shard_idx, server in enumerate(self.servers):
                router.replace(shard_idx, server.attach(router.handles))

    def make_server(self, shard_idx: int) -> IpcServer:
        device = self.shard_devices[shard_idx]
        experts = SimulatedExperts(device, PLACEMENT, shard_idx)
        server = IpcServer(
            device, self.block, shard_idx, message_shape(), LAYERS, experts, lambda: self.served, self.limits,
            clock=lambda: self.now,
        )  # fmt: skip
        server.capture()
        return server

    def serve(self) -> None:
        """Everything that can go on goes on, until nothing does."""
        for _ in range(1000):
            for device in self.devices:
                device.run()
            found = [server.poll() for server in self.servers]
            if not any(found):
                return
            for device in self.shard_devices:
                device.run()
        raise AssertionError("it never ends")

    def close(self) -> None:
        for router in self.routers:
            router.close()


@dataclass
class Tokens:
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def random(cls, num_tokens: int, seed: int = 0, experts: int = EXPERTS) -> Tokens:
        generator = torch.Generator().manual_seed(seed)
        return cls(
            torch.randn(num_tokens, 128, generator=generator).bfloat16(),
            torch.rand(num_tokens, experts, generator=generator).topk(2).indices.int(),
            torch.rand(num_tokens, 2, generator=generator),
        )

    def expected(self, layer_pos: int) -> torch.Tensor:
        scale = factors(LAYERS, EXPERTS)[layer_pos][self.ids.long()] * self.weights
        return self.hidden.float() * scale.sum(1, keepdim=True)

    def send(self, router: IpcTransport, layer_pos: int) -> torch.Tensor:
        router.dispatch(layer_pos, self.hidden, self.ids, self.weights)
        return router.combine()


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got.float(), expected, rtol=1e-2, atol=1e-3)

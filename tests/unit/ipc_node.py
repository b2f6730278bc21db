"""A node of CPU shards behind the ipc transport: shards as threads of this process or as processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import torch

from ep.far_shards import FarShards
from ep.ipc_options import IpcOptions
from ep.ipc_router import IpcRouter, Replace
from ep.ipc_setup import MESSAGE_TOKENS, message_shape, open_device
from ep.ipc_shard import IpcShard
from ep.placement import even_split
from ep.router import Router
from ep.share import WHOLE, Share
from ep.transport.handshake import Greeting
from ep.transport.ipc import IpcTransport
from ep.transport.ipc_handles import RouterHandles, ShardHandles
from ep.transport.mailbox import MailboxBlock
from ep.transport.sockets import SocketTransport
from tests.unit.shards import KEY, NODE, make_experts, make_shard, make_spec

CPU = torch.device("cpu")
SPEC = make_spec(hidden_size=128)
EXPERTS = make_experts(SPEC, torch.bfloat16)
NUM_SHARDS = 2
PLACEMENT = even_split(SPEC.num_moe_layers, SPEC.num_experts, NUM_SHARDS)
_names = count()


def make_options(num_routers: int, dispatch_dtype: str = "bf16", combine_dtype: str = "f32") -> IpcOptions:
    return IpcOptions(f"test-{os.getpid()}-{time.time_ns()}-{next(_names)}", num_routers, dispatch_dtype, combine_dtype)


@dataclass
class ShardProcess:
    """A shard's process; `attach` and `stop` are calls into it."""

    process: Any
    pipe: Connection

    @classmethod
    def start(cls, options: IpcOptions, shard_idx: int) -> ShardProcess:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ep.shard"])
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, options, shard_idx), daemon=True)
        process.start()
        assert ours.recv() == "ready"
        return cls(process, ours)

    def attach(self, handles: RouterHandles) -> ShardHandles:
        self.pipe.send(handles)
        return self.pipe.recv()

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def close(self) -> None:
        if self.process.is_alive():
            self.pipe.send(None)
            self.process.join(10)


def make_thread(options: IpcOptions, shard_idx: int) -> IpcShard:
    return IpcShard(make_shard(SPEC, PLACEMENT, shard_idx, EXPERTS), options, CPU)


def _serve(pipe: Connection, options: IpcOptions, shard_idx: int) -> None:
    torch.set_num_threads(1)
    shard = make_thread(options, shard_idx)
    pipe.send("ready")
    while (handles := pipe.recv()) is not None:
        pipe.send(shard.attach(handles))
    shard.close()


class Node:
    """Shards that live until the block ends, and routers that meet them."""

    def __init__(self, options: IpcOptions, in_process: bool = True) -> None:
        self.options, self._stack = options, ExitStack()
        self.make = make_thread if in_process else ShardProcess.start
        self.shards: list[IpcShard | ShardProcess] = []
        for shard_idx in range(NUM_SHARDS):
            self.shards.append(self.make(options, shard_idx))
            self._stack.callback(lambda shard_idx=shard_idx: self.shards[shard_idx].close())

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def router(
        self,
        rank: int = 0,
        share: Share = WHOLE,
        far: int | None = None,
        deadline_s: float = 30.0,
        replace: bool = True,
    ) -> IpcRouter:
        """far: a shard that it asks over TCP."""
        device, block = open_device(CPU), MailboxBlock.open(self.options.block, self.options.num_routers, NUM_SHARDS)
        message = message_shape(SPEC, self.options, CPU)
        transport = IpcTransport(device, block, rank, message, PLACEMENT, deadline_s)

        def meet(shard_idx: int) -> None:
            transport.replace(shard_idx, self.shards[shard_idx].attach(transport.handles))

        def open_slots() -> FarShards | None:
            for shard_idx in set(range(NUM_SHARDS)) - {far}:
                meet(shard_idx)
            if far is None:
                return None
            transport.leave_out([far])
            return FarShards(self._sockets(deadline_s), [far], MESSAGE_TOKENS, CPU)

        def start_anew(shard_idx: int, _: Exception) -> None:
            self.shards[shard_idx] = self.make(self.options, shard_idx)
            meet(shard_idx)

        again: Replace | None = start_anew if replace else None
        router = IpcRouter(SPEC, PLACEMENT, transport, device, open_slots, again, share)
        router.open_slots()
        self._stack.callback(block.close)
        self._stack.callback(router.close)
        return router

    def _sockets(self, deadline_s: float) -> Router:
        """To other incarnations of the shards, by TCP."""
        self.far_shards = [make_shard(SPEC, PLACEMENT, idx, EXPERTS) for idx in range(NUM_SHARDS)]
        endpoints = [shard.listen(KEY, NODE, host="127.0.0.1") for shard in self.far_shards]
        for shard in self.far_shards:
            self._stack.callback(shard.close)
        transport = SocketTransport(endpoints, Greeting.of(SPEC, "far", MESSAGE_TOKENS), KEY, "another node")
        return Router(SPEC, PLACEMENT, transport, deadline_s=deadline_s)

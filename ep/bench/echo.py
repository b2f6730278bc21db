"""Shards without experts, each in a process of its own: what they get they send back. For the transport's benchmark."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep.errors import TransportError
from ep.transport.base import Endpoint
from ep.transport.buffer import from_raw
from ep.transport.handshake import Identity
from ep.transport.listener import Listener
from ep.transport.scheduling import let_waker_run_on

FINGERPRINT = "echo"
START_S = 60.0


@dataclass(frozen=True)
class EchoSetup:
    """One echoing shard. host: the address of its node; hidden_size and max_tokens bound what it is sent."""

    shard_idx: int
    key: bytes
    node_id: str
    unix_dir: str
    host: str
    hidden_size: int
    max_tokens: int


@dataclass(frozen=True)
class EchoProcess:
    process: Any
    pipe: Connection
    endpoint: Endpoint

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(5)
        self.process.kill()


def start_echo(setup: EchoSetup) -> EchoProcess:
    """Raises TransportError if it does not start."""
    process, pipe = _start(_echo, setup)
    if not pipe.poll(START_S):
        process.kill()
        raise TransportError(f"echo shard {setup.shard_idx} did not start within {START_S:g} s")
    return EchoProcess(process, pipe, pipe.recv())


def _echo(pipe: Connection, setup: EchoSetup) -> None:
    torch.set_num_threads(1)
    identity = Identity(setup.shard_idx, FINGERPRINT, setup.hidden_size, 0, 1, setup.max_tokens)
    listener = Listener(identity, setup.key)
    pipe.send(listener.open(setup.node_id, Path(setup.unix_dir), setup.host))
    threading.Thread(target=_close_when_told, args=(pipe, listener), daemon=True).start()
    let_waker_run_on()
    with torch.inference_mode():
        while not listener.is_closed:
            for request in listener.wait():
                request.out.copy_(from_raw(request.views.rows, request.message.dtype))
                listener.answer(request, 0)
    listener.hang_up()


def _close_when_told(pipe: Connection, listener: Listener) -> None:
    """Asking the pipe between two requests would be measured with them."""
    with contextlib.suppress(EOFError):
        pipe.recv()
    listener.close()


@dataclass(frozen=True)
class GlooSetup:
    """A rank of the baseline: torch.distributed's gloo over loopback. Rank 0 is the router."""

    rank: int
    world_size: int
    port: int
    hidden_size: int


class GlooRouter:
    """Rank 0: isend and irecv with every other rank."""

    def __init__(self, num_shards: int, hidden_size: int) -> None:
        port, world_size = _free_port(), num_shards + 1
        self._started = [
            _start(_gloo_echo, GlooSetup(rank, world_size, port, hidden_size)) for rank in range(1, world_size)
        ]
        _join(GlooSetup(0, world_size, port, hidden_size))

    def expect(self, num_tokens: int, num_messages: int) -> None:
        """Tells the ranks what comes next: gloo's receiver must know it beforehand."""
        for _, pipe in self._started:
            pipe.send((num_tokens, num_messages))

    def round_trip(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        answers = [torch.empty_like(part) for part in rows]
        sent = [dist.isend(part, rank + 1) for rank, part in enumerate(rows)]
        received = [dist.irecv(answer, rank + 1) for rank, answer in enumerate(answers)]
        for work in (*sent, *received):
            if work is not None:
                work.wait()
        return answers

    def close(self) -> None:
        for process, _ in self._started:
            process.kill()
            process.join()
        dist.destroy_process_group()


def _gloo_echo(pipe: Connection, setup: GlooSetup) -> None:
    torch.set_num_threads(1)
    _join(setup)
    while True:
        num_tokens, num_messages = pipe.recv()
        rows = torch.empty(num_tokens, setup.hidden_size, dtype=torch.bfloat16)
        for _ in range(num_messages):
            dist.recv(rows, 0)
            dist.send(rows, 0)


def _join(setup: GlooSetup) -> None:
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{setup.port}", rank=setup.rank, world_size=setup.world_size
    )


def _start(target: Any, setup: Any) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, setup), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])

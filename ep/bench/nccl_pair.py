"""The baseline of `ep bench transport --transport ipc`: two ranks on two GPUs, NCCL's all_to_all of the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from ep.errors import TransportError
from ep.kernels.p2p_layout import MessageShape

ANSWER_S = 120.0


class NcclPair:
    """Rank 0 in this process on GPU 0, rank 1 in another one on GPU 1, in lockstep: messages there, partials back."""

    def __init__(self) -> None:
        # NVLink multicast is not set up on every machine, and NCCL then fails instead of doing without.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_second_rank, args=(port, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._rank = _Rank(0, port)

    def prepare(self, num_tokens: int, message: MessageShape, layers: int) -> None:
        """A graph of so many layers on both sides."""
        scales = message.hidden // 128 * 4 if message.quantized else 0
        there = num_tokens * (message.hidden * message.dtype.itemsize + scales + message.top_k * 8)
        back = num_tokens * message.hidden * message.partial_dtype.itemsize
        self._pipe.send((there, back, layers))
        self._rank.prepare(there, back, layers)
        self._answered()

    def replay(self) -> float:
        """Seconds of one replay."""
        self._pipe.send(None)
        seconds = self._rank.replay()
        self._answered()
        return seconds

    def close(self) -> None:
        self._pipe.send(())
        self._rank.close()
        self._process.join(ANSWER_S)

    def _answered(self) -> None:
        if not self._pipe.poll(ANSWER_S):
            raise TransportError("NCCL's second rank does not answer; its messages are above")
        self._pipe.recv()


class _Rank:
    def __init__(self, rank: int, port: int) -> None:
        self._rank = rank
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def prepare(self, there: int, back: int, layers: int) -> None:
        """Rank 0 sends `there` bytes and gets `back`; rank 1 the other way round."""
        sends, gets = (there, back) if self._rank == 0 else (back, there)
        to_other = [0, 0]
        to_other[1 - self._rank] = sends
        nothing = [0, 0]
        from_other = [0, 0]
        from_other[1 - self._rank] = gets
        out = torch.zeros(sends, dtype=torch.uint8, device="cuda")
        into = torch.zeros(gets, dtype=torch.uint8, device="cuda")
        empty = torch.zeros(0, dtype=torch.uint8, device="cuda")

        def layer() -> None:
            for sender in (0, 1):
                if sender == self._rank:
                    dist.all_to_all_single(empty, out, nothing, to_other)
                else:
                    dist.all_to_all_single(into, empty, from_other, nothing)

        layer()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(layers):
                layer()

    def replay(self) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        self._graph.replay()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def close(self) -> None:
        dist.destroy_process_group()


def _second_rank(port: int, pipe: Connection) -> None:
    rank = _Rank(1, port)
    while True:
        try:
            command = pipe.recv()
        except EOFError:
            return
        if command == ():
            rank.close()
            return
        if command is None:
            rank.replay()
        else:
            rank.prepare(*command)
        pipe.send("done")

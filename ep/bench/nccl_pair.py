"""The baseline of `ep bench transport --transport ipc`: two ranks on two GPUs, NCCL's all_to_all of the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from ep.bench.ipc_shards import answer
from ep.kernels.p2p_layout import MessageShape

ANSWER_S, END_S = 120.0, 10.0


class NcclPair:
    """Rank 0 on GPU 0, rank 1 on GPU 1, in processes of their own and in lockstep: messages there, partials back."""

    def __init__(self) -> None:
        # NVLink multicast is not set up on every machine, and NCCL then fails instead of doing without.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in (0, 1):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def prepare(self, num_tokens: int, message: MessageShape, layers: int) -> None:
        """A graph of so many layers on both sides. Raises TransportError."""
        scales = message.hidden // 128 * 4 if message.quantized else 0
        there = num_tokens * (message.hidden * message.dtype.itemsize + scales + message.top_k * 8)
        back = num_tokens * message.hidden * message.partial_dtype.itemsize
        self._ask((there, back, layers))

    def replay(self) -> float:
        """Seconds of one replay, as rank 0 sees it. Raises TransportError."""
        return self._ask(None)

    def close(self) -> None:
        """Ends both; one that hangs in NCCL is killed."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(END_S)
            if process.is_alive():
                process.kill()

    def _ask(self, command: tuple[int, int, int] | None) -> float:
        for pipe in self._pipes:
            pipe.send(command)
        answers: list[float] = [
            answer(pipe, ANSWER_S, f"NCCL's rank {rank} gave no answer; its messages are above")
            for rank, pipe in enumerate(self._pipes)
        ]
        return answers[0]


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
        self._buffers = (out, into)  # the graph's

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
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        self._graph.replay()
        torch.cuda.synchronize()
        return time.perf_counter() - start


def _serve(rank: int, port: int, pipe: Connection) -> None:
    pair = _Rank(rank, port)
    while True:
        try:
            command = pipe.recv()
        except EOFError:
            os._exit(0)  # NCCL's own end waits for graphs that hold its communicator
        if command is None:
            pipe.send(pair.replay())
        else:
            pair.prepare(*command)
            pipe.send(0.0)

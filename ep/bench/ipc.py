"""`ep bench transport --transport ipc`: round trips between GPUs from within one captured graph, without compute.

Timed: plan, put, the shard's polling thread, collect, return, wait and combine of every layer, by replaying a graph of
`layers` of them. Verified for every case: the bits that the shards got, and the sums that came back. With two GPUs or
more, NCCL's all_to_all of the same bytes takes turns with ours; with one, shards run on streams of their own beside the
router, and once in a process of their own on the same GPU, which then gets slices of its time.
"""

from __future__ import annotations

import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from rich.console import Console

from ep.bench.conditions import conditions
from ep.bench.ipc_result import Arrangement, IpcBench, IpcBenchOptions, IpcRoundTrip, PollLatency, describe
from ep.bench.ipc_shards import BenchShard, FixedPartials, ProcessShard, ShardSetup, ThreadShard, payload
from ep.bench.nccl_pair import NcclPair
from ep.bench.result import publish
from ep.errors import OptionError, TransportError
from ep.ipc_setup import limits
from ep.kernels import p2p_reference
from ep.kernels.devices import current_device
from ep.kernels.p2p import Plan
from ep.kernels.p2p_layout import MessageShape, pack_header
from ep.kernels.reference import TOKEN_BLOCK, quantize_tokens
from ep.placement import even_split
from ep.terminal import Terminal
from ep.transport.ipc import IpcTransport
from ep.transport.ipc_device import GpuDevice
from ep.transport.mailbox import MailboxBlock

TOP_K, NUM_EXPERTS = 8, 256
SLICED_LAYERS = 4
"""Of a graph between two processes on one GPU, each layer of which takes milliseconds."""
PROBES = 200


def run(options: IpcBenchOptions) -> IpcBench:
    """Measures, prints tables and one line of JSON. Raises OptionError, and TransportError for a wrong payload."""
    _check(options)
    before, num_gpus = conditions(), torch.cuda.device_count()
    plans = arrangements(options, num_gpus)
    found: list[IpcRoundTrip] = []
    polls: list[PollLatency] = []
    with Terminal().progress("round trips", sum(len(_tokens(options, plan)) for plan in plans)) as (bar, task):
        for plan in plans:
            with _Rig(options, plan) as rig:
                for num_tokens in _tokens(options, plan):
                    found.append(rig.measure(num_tokens))
                    bar.advance(task)
                polls += rig.measure_polls()
    bench = IpcBench(options, before, current_device(), num_gpus, tuple(found), tuple(polls))
    publish("transport-ipc", bench, describe(bench), Console())
    return bench


def _check(options: IpcBenchOptions) -> None:
    command = "ep bench transport --transport ipc"
    if options.hidden_size % TOKEN_BLOCK:
        raise OptionError(f"{command}: hidden size is {options.hidden_size}, expected a multiple of {TOKEN_BLOCK}")
    for num_shards in options.shards:
        if num_shards not in (1, 2, 4, 8):
            raise OptionError(f"{command}: shards is {num_shards}, expected 1, 2, 4 or 8")
    if not torch.cuda.is_available():
        raise OptionError(f"{command}: this machine has no GPU that torch can use, expected one at least")


def arrangements(options: IpcBenchOptions, num_gpus: int) -> list[Arrangement]:
    """What this machine has the GPUs for. The router is on GPU 0; shards beyond the other GPUs are threads there."""
    if num_gpus < 2:
        here = [
            Arrangement("streams", num, options.layers, (True,) * num, (0,) * num) for num in options.shards
        ]
        return [*here, Arrangement("slices", 1, min(options.layers, SLICED_LAYERS), (False,), (0,))]
    found = []
    for num in options.shards:
        gpus = tuple(shard + 1 if shard + 1 < num_gpus else 0 for shard in range(num))
        found.append(Arrangement("gpus", num, options.layers, tuple(gpu == 0 for gpu in gpus), gpus))
    return found


def _tokens(options: IpcBenchOptions, plan: Arrangement) -> tuple[int, ...]:
    return options.tokens if plan.name != "slices" else options.tokens[:1]


class _Rig:
    """A router on GPU 0 and the shards of one arrangement."""

    def __init__(self, options: IpcBenchOptions, plan: Arrangement) -> None:
        self._options, self._arrangement = options, plan
        most = max(options.tokens)
        dtype = current_device(0).fp8_dtype or torch.bfloat16
        self._message = MessageShape(most, options.hidden_size, TOP_K, dtype)
        rows = -(-most // 8) * 8
        self._limits = replace(limits(torch.device("cuda")), job_tokens=rows, graph_tokens=rows)
        self._stack = ExitStack()
        self._nccl: NcclPair | None = None

    def __enter__(self) -> _Rig:
        plan, name = self._arrangement, f"bench-{os.getpid()}"
        torch.cuda.set_device(0)
        with ExitStack() as stack:
            self._block = MailboxBlock.open(name, 1, plan.num_shards)
            stack.callback(self._block.close)
            stream = torch.cuda.Stream()
            stack.enter_context(torch.cuda.stream(stream))
            placement = even_split(self._options.layers, NUM_EXPERTS, plan.num_shards)
            self._router = IpcTransport(GpuDevice(0), self._block, 0, self._message, placement)
            stack.callback(self._router.close)
            self._shards: list[BenchShard] = []
            for shard_idx, (in_process, gpu) in enumerate(zip(plan.in_process, plan.gpus, strict=True)):
                setup = ShardSetup(
                    name, 1, plan.num_shards, shard_idx, gpu, self._message, self._options.layers, self._limits,
                    FixedPartials,
                )  # fmt: skip
                shard = ThreadShard(setup) if in_process else ProcessShard(setup)
                stack.callback(shard.stop)
                torch.cuda.set_device(0)
                self._router.replace(shard_idx, shard.attach(self._router.handles))
                self._shards.append(shard)
            if plan.name == "gpus":
                self._nccl = NcclPair()
                stack.callback(self._nccl.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def measure(self, num_tokens: int) -> IpcRoundTrip:
        """Every shard gets all of the tokens."""
        plan, options, router = self._arrangement, self._options, self._router
        generator = torch.Generator().manual_seed(options.seed)
        hidden = torch.randn(num_tokens, options.hidden_size, generator=generator).bfloat16().cuda()
        ids = _ids(num_tokens, plan.num_shards, generator).cuda()
        weights = torch.rand(num_tokens, TOP_K, generator=generator).cuda()
        outs: list[torch.Tensor] = []

        def layers(num: int) -> None:
            for layer_pos in range(num):
                router.dispatch(layer_pos, hidden, ids, weights)
                outs.append(router.combine())

        layers(1)
        torch.cuda.current_stream().synchronize()
        outs.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            layers(plan.layers)
        before = [shard.stats() for shard in self._shards]
        launched = [(stats.launches, stats.launch_ns) for stats in before]
        times = []
        if self._nccl is not None:
            self._nccl.prepare(num_tokens, self._message, plan.layers)
        nccl_times = []
        for round_idx in range(options.rounds + 1):  # the first one warms up
            start = time.perf_counter()
            graph.replay()
            torch.cuda.current_stream().synchronize()
            took = (time.perf_counter() - start) / plan.layers * 1e6
            router.check()
            if round_idx:
                times.append(took)
            if self._nccl is not None:
                nccl_times.append(self._nccl.replay() / plan.layers * 1e6)
        self._verify(outs, hidden, weights)
        jobs = launch_ns = 0
        for (old_jobs, old_ns), shard in zip(launched, self._shards, strict=True):
            stats = shard.stats()
            jobs, launch_ns = jobs + stats.launches - old_jobs, launch_ns + stats.launch_ns - old_ns
        return IpcRoundTrip(
            plan.name,
            plan.num_shards,
            num_tokens,
            plan.layers,
            round(statistics.median(times), 2),
            round(min(times), 2),
            round(max(times), 2),
            tuple(round(took, 2) for took in times),
            round(statistics.median(nccl_times[1:]), 2) if nccl_times else None,
            round(launch_ns / max(jobs, 1) / 1e3, 2),
        )

    def _verify(self, outs: list[torch.Tensor], hidden: torch.Tensor, weights: torch.Tensor) -> None:
        """Raises TransportError."""
        num_tokens, num_shards, message = len(hidden), self._arrangement.num_shards, self._message
        answers = torch.stack([payload(message, self._limits.job_tokens, shard) for shard in range(num_shards)])
        plan = Plan.allocate(num_tokens, TOP_K, num_shards, torch.device("cpu"))
        plan.owners.fill_((1 << num_shards) - 1)
        expected = torch.empty(num_tokens, message.hidden, dtype=torch.bfloat16)
        p2p_reference.combine_partials(answers, plan, expected)
        wrong = [layer for layer, out in enumerate(outs) if not torch.equal(out.cpu(), expected)]
        if wrong:
            raise TransportError(f"{num_tokens} tokens: the sum of layer {wrong[0]} is not what the shards returned")
        sent = hidden.cpu()
        rows, scales = sent, None
        if message.quantized:
            quantized = quantize_tokens(sent, message.dtype)
            rows, scales = quantized.q, quantized.scale_inv
        for shard_idx, shard in enumerate(self._shards):
            seen = shard.newest_job(num_tokens)
            is_same = (
                torch.equal(seen.rows, rows.view(torch.uint8))
                and (scales is None or seen.scales is None or torch.equal(seen.scales, scales.view(torch.uint8)))
                and torch.equal(seen.weights, weights.cpu())
            )
            if not is_same:
                raise TransportError(f"{num_tokens} tokens: shard {shard_idx} got other rows than were sent")

    def measure_polls(self) -> list[PollLatency]:
        """The first shard's thread, asked by this host with messages that it refuses at once: no GPU is involved."""
        found = []
        block = self._block
        seq = 1 << 30
        for idle_ms in (0.1, 10.0):
            times = []
            for _ in range(PROBES):
                time.sleep(idle_ms / 1e3)
                seq += 1
                start = time.perf_counter()
                block.headers[0, 0] = pack_header(seq, 0, 1, generation=-1)  # served by nobody
                while block.refusals[0, 0, 0] != seq:
                    if time.perf_counter() - start > 5:
                        raise TransportError("the shard's thread does not look at its mailboxes")
                times.append((time.perf_counter() - start) * 1e6)
            p50, p99 = (round(float(np.percentile(times, q)), 2) for q in (50, 99))
            found.append(PollLatency(self._arrangement.name, self._arrangement.num_shards, idle_ms, p50, p99))
        return found


def _ids(num_tokens: int, num_shards: int, generator: torch.Generator) -> torch.Tensor:
    """[T, K] experts, drawn so that every token has some on every shard."""
    per_shard = NUM_EXPERTS // num_shards
    columns = []
    for choice in range(TOP_K):
        first = (choice % num_shards) * per_shard
        columns.append(first + torch.randint(0, per_shard, (num_tokens,), generator=generator))
    return torch.stack(columns, dim=1).int()

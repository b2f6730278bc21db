"""What `ep bench transport --transport ipc` was asked and found, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass

from ep.bench.conditions import Conditions
from ep.bench.page import Report
from ep.bench.plot import Figure, Series
from ep.kernels.devices import Device
from ep.sheet import Sheet

ONE_GPU = "One GPU: no transfer between GPUs is in these figures, and there is nothing to compare them with."


@dataclass(frozen=True)
class IpcBenchOptions:
    """Options of `ep bench transport --transport ipc`. tokens: rows that go to every shard. rounds: replays that are
    timed, in turns with NCCL's."""

    tokens: tuple[int, ...] = (8, 32, 128, 512)
    hidden_size: int = 7168
    shards: tuple[int, ...] = (1, 2)
    layers: int = 58
    rounds: int = 20
    seed: int = 0
    output: str | None = None
    page: str | None = None


@dataclass(frozen=True)
class Arrangement:
    """Where the shards run. name: gpus (each on another GPU than the router, as far as there are any), streams (on
    streams of the router's process and GPU), slices (in processes of their own on the router's GPU)."""

    name: str
    num_shards: int
    layers: int
    in_process: tuple[bool, ...]
    gpus: tuple[int, ...]


@dataclass(frozen=True)
class IpcRoundTrip:
    """Microseconds a layer: median, least and most of the replays; nccl_us: of the same bytes, None without a second
    GPU. launch_us: of a job's graph by the shard's thread, ahead of the message that it is for."""

    arrangement: str
    num_shards: int
    tokens: int
    layers: int
    us: float
    min_us: float
    max_us: float
    us_rounds: tuple[float, ...]
    nccl_us: float | None
    launch_us: float


@dataclass(frozen=True)
class PollLatency:
    """Microseconds from a header's writing by a host to the shard's answer seen by that host, after an idle gap."""

    arrangement: str
    num_shards: int
    idle_ms: float
    p50_us: float
    p99_us: float


@dataclass(frozen=True)
class IpcBench:
    options: IpcBenchOptions
    conditions: Conditions
    device: Device
    num_gpus: int
    round_trips: tuple[IpcRoundTrip, ...]
    polls: tuple[PollLatency, ...]


def describe(result: IpcBench) -> Report:
    """The tables, and a plot of every arrangement's medians."""
    options = result.options
    trips = Sheet(
        f"Round trip of a layer without compute, hidden {options.hidden_size}, µs",
        ("shards on", "shards", "tokens", "layers", "median", "min", "max", "NCCL", "launch"),
        tuple(
            (
                row.arrangement,
                str(row.num_shards),
                str(row.tokens),
                str(row.layers),
                f"{row.us:,.1f}",
                f"{row.min_us:,.1f}",
                f"{row.max_us:,.1f}",
                "-" if row.nccl_us is None else f"{row.nccl_us:,.1f}",
                f"{row.launch_us:,.1f}",
            )
            for row in result.round_trips
        ),
        ONE_GPU if result.num_gpus < 2 else "",
    )
    polls = Sheet(
        "A message's way to the shard's thread and its refusal back, µs",
        ("shards on", "shards", "idle ms", "p50", "p99"),
        tuple(
            (row.arrangement, str(row.num_shards), f"{row.idle_ms:g}", f"{row.p50_us:,.1f}", f"{row.p99_us:,.1f}")
            for row in result.polls
        ),
    )
    return Report(
        "Round trips between GPUs of one node",
        (trips, polls),
        (_figure(result),),
        f"{result.num_gpus} x {result.device.name}. A captured graph of {options.layers} layers, each of which sends "
        f"all its tokens to every shard, replayed {options.rounds} times; launch is what it takes a shard's "
        "thread to launch a job's graph, ahead of its message. All sums and all rows that arrived were compared, bit "
        "for bit.",
    )


def _figure(result: IpcBench) -> Figure:
    series = []
    for arrangement, num_shards in dict.fromkeys((row.arrangement, row.num_shards) for row in result.round_trips):
        rows = [row for row in result.round_trips if (row.arrangement, row.num_shards) == (arrangement, num_shards)]
        if len(rows) > 1:
            tokens, medians = tuple(row.tokens for row in rows), tuple(row.us for row in rows)
            low, high = tuple(row.min_us for row in rows), tuple(row.max_us for row in rows)
            series.append(Series(f"{arrangement}, {num_shards}", tokens, medians, low, high))
            if all(row.nccl_us is not None for row in rows):
                nccl = tuple(row.nccl_us or 0.0 for row in rows)
                series.append(Series(f"NCCL beside {num_shards}", tokens, nccl, dashed=True))
    return Figure("layer", "A layer's round trip, least to most", "tokens", "µs", tuple(series), log_x=True)

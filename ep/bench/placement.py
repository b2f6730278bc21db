"""`ep bench placement`: plans beside vLLM's policy and a lower bound, and batches spread over replicas.

Excess is (max - mean) / mean over a layer's shards, 0 when even; means over layers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from ep.assign import Assigner
from ep.bench.conditions import Conditions, conditions
from ep.bench.expert_loads import LOADS, Windows, batch, windows
from ep.bench.page import Report
from ep.bench.placement_baseline import Policy, vllm_policy
from ep.bench.plot import Figure, Series
from ep.bench.result import publish
from ep.errors import OptionError
from ep.placement import Placement
from ep.planning.imbalance import imbalance
from ep.planning.plan import plan, shard_load
from ep.planning.request import PlanRequest
from ep.sheet import Sheet

SHARDS = (8, 16, 32, 64, 72, 128, 144, 288)
REDUNDANT = (0, 32, 64)
BATCHES = 32
_FILE_WIDTH = 150
"""A file has no width of its own, and a cut table is of no use in it."""
Float64Array = npt.NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True)
class PlacementBenchOptions:
    """Options of `ep bench placement`. redundant: slots per layer. num_tokens, top_k: of a batch that the router
    spreads. repeats: times that each plan is made; its time is the median."""

    layers: int = 58
    experts: int = 256
    loads: tuple[str, ...] = LOADS
    shards: tuple[int, ...] = SHARDS
    redundant: tuple[int, ...] = REDUNDANT
    num_tokens: int = 256
    top_k: int = 8
    repeats: int = 3
    seed: int = 0
    output: str | None = None
    page: str | None = None


@dataclass(frozen=True)
class PlacementResult:
    """One load, number of shards and of redundant slots. vllm_*: None without vLLM, or where shards do not divide
    slots.

    excess, vllm_excess, bound_excess: of the window that was planned for; the bound's is what no placement is below.
    gap, max_gap: the busiest shard's load over the bound, less one: mean and largest of the layers. split_excess: with
    each expert's load split over its replicas in the best way. next_*: the same placement in the window after.
    waterfill, round_robin, random: excess of pairs per shard in batches of the window after, of one layer each; *_us
    the median time of `Assigner.place`.
    """

    load: str
    num_shards: int
    num_redundant: int
    excess: float
    vllm_excess: float | None
    bound_excess: float
    gap: float
    max_gap: float
    split_excess: float
    next_excess: float
    next_vllm_excess: float | None
    plan_ms: float
    vllm_plan_ms: float | None
    waterfill: float
    round_robin: float
    random: float
    waterfill_us: float
    round_robin_us: float


@dataclass(frozen=True)
class PlacementBench:
    options: PlacementBenchOptions
    conditions: Conditions
    results: tuple[PlacementResult, ...]


def run(options: PlacementBenchOptions) -> PlacementBench:
    """Raises OptionError."""
    _check(options)
    before = conditions()
    policy = vllm_policy()
    cases = [
        (load, num_shards, num_redundant)
        for load in options.loads
        for num_redundant in options.redundant
        for num_shards in options.shards
        if num_shards <= options.experts + num_redundant and num_redundant <= (num_shards - 1) * options.experts
    ]
    results = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for load, num_shards, num_redundant in progress.track(cases, description="plans"):
            loads = windows(load, options.layers, options.experts, options.seed)
            results.append(_measure(options, loads, policy, load, PlanRequest(num_shards, num_redundant)))
    return PlacementBench(options, before, tuple(results))


def report(result: PlacementBench) -> None:
    """A table, then one line of JSON."""
    console = Console()
    publish("placement", result, describe(result), console if console.is_terminal else Console(width=_FILE_WIDTH))


def describe(result: PlacementBench) -> Report:
    """The table, and a plot over the number of shards for each load and number of redundant slots."""
    options = result.options
    batches = f"batches of {options.num_tokens}: waterfill / round robin / random"
    shares = ("vLLM", "ours", "bound", "gap", "next: vLLM / ours", batches)
    columns = ("load", "shards", "redundant", *shares, "plan ms: vLLM / ours", "assign µs")
    rows = tuple(
        (
            row.load,
            str(row.num_shards),
            str(row.num_redundant),
            _percent(row.vllm_excess),
            _percent(row.excess),
            _percent(row.bound_excess),
            _percent(row.gap),
            f"{_percent(row.next_vllm_excess)} / {_percent(row.next_excess)}",
            f"{_percent(row.waterfill)} / {_percent(row.round_robin)} / {_percent(row.random)}",
            f"{'-' if row.vllm_plan_ms is None else f'{row.vllm_plan_ms:.0f}'} / {row.plan_ms:.0f}",
            f"{row.waterfill_us:.0f} / {row.round_robin_us:.0f}",
        )
        for row in result.results
    )
    title = f"Excess of the busiest shard, %, {options.layers} layers x {options.experts} experts"
    missing = all(row.vllm_excess is None for row in result.results)
    note = "vLLM's policy: not installed, or shards do not divide slots" if missing else ""
    sheet = Sheet(title, columns, rows, note, spare=(7, 8, 10))
    most = max(options.redundant)
    return Report("Placements beside vLLM's policy and a lower bound", (sheet,), tuple(_figures(result, most)))


def _figures(result: PlacementBench, num_redundant: int) -> Iterator[Figure]:
    for load in result.options.loads:
        rows = [row for row in result.results if (row.load, row.num_redundant) == (load, num_redundant)]
        vllm = [row for row in rows if row.vllm_excess is not None]
        series = (
            Series("vLLM's policy", _places(vllm), tuple(100 * (row.vllm_excess or 0.0) for row in vllm)),
            Series("ours", _places(rows), tuple(100 * row.excess for row in rows)),
            Series("bound", _places(rows), tuple(100 * row.bound_excess for row in rows), dashed=True),
        )
        if rows:
            title = f"{load}: excess of the busiest shard, {num_redundant} redundant slots"
            yield Figure(load, title, "shards", "%", tuple(one for one in series if one.x), log_x=True)


def _places(rows: Sequence[PlacementResult]) -> tuple[float, ...]:
    return tuple(row.num_shards for row in rows)


def _check(options: PlacementBenchOptions) -> None:
    unknown = [load for load in options.loads if load not in LOADS]
    if unknown:
        raise OptionError(f"load is {unknown[0]}, expected one of {', '.join(LOADS)}")
    if options.top_k > options.experts:
        raise OptionError(f"top-k is {options.top_k}, expected at most {options.experts}, the number of experts")


def _measure(
    options: PlacementBenchOptions, loads: Windows, policy: Policy | None, load: str, request: PlanRequest
) -> PlacementResult:
    num_shards, num_redundant = request.num_shards, request.num_redundant
    ours, plan_ms = _timed(lambda: plan(loads.past, request), options.repeats)
    mean = loads.past.sum(axis=1) / num_shards
    vllm_excess = next_vllm_excess = vllm_plan_ms = None
    if policy is not None and (options.experts + num_redundant) % num_shards == 0:
        found = policy
        slots, vllm_plan_ms = _timed(lambda: found(loads.past, num_shards, num_redundant), options.repeats)
        vllm_excess, next_vllm_excess = (_excess(_load_of_slots(slots, w)) for w in (loads.past, loads.next))
    batches = _Batches(options, loads.next_shares)
    waterfill, round_robin, random = (
        batches.spread(ours.placement, policy_name) for policy_name in ("waterfill", "round_robin", "random")
    )
    return PlacementResult(
        load=load,
        num_shards=num_shards,
        num_redundant=num_redundant,
        excess=_excess(ours.shard_load),
        vllm_excess=vllm_excess,
        bound_excess=float((ours.lower_bound / mean - 1).mean()),
        gap=float(ours.gap.mean()),
        max_gap=float(ours.gap.max()),
        split_excess=float((ours.split_at_will / mean - 1).mean()),
        next_excess=_excess(shard_load(ours.placement, loads.next)),
        next_vllm_excess=next_vllm_excess,
        plan_ms=plan_ms,
        vllm_plan_ms=vllm_plan_ms,
        waterfill=waterfill.excess,
        round_robin=round_robin.excess,
        random=random.excess,
        waterfill_us=waterfill.us,
        round_robin_us=round_robin.us,
    )


@dataclass(frozen=True)
class _Spread:
    excess: float
    us: float


class _Batches:
    """The same batches for every policy, each of one layer."""

    def __init__(self, options: PlacementBenchOptions, shares: Float64Array) -> None:
        rng = np.random.default_rng(options.seed)
        self._layers = [int(layer) for layer in rng.integers(0, len(shares), BATCHES)]
        self._ids = [batch(shares[layer], options.num_tokens, options.top_k, rng) for layer in self._layers]

    def spread(self, placement: Placement, policy: str) -> _Spread:
        assigner = Assigner(placement, policy)
        excesses, times = [], []
        for layer, ids in zip(self._layers, self._ids, strict=True):
            assigner.place(layer, ids)  # the first call of a layer makes its lists
            start = time.perf_counter()
            shards, _ = assigner.place(layer, ids)
            times.append((time.perf_counter() - start) * 1e6)
            excesses.append(_excess(np.bincount(shards.ravel(), minlength=placement.num_shards)))
        return _Spread(statistics.fmean(excesses), statistics.median(times))


def _timed(call: Callable[[], T], repeats: int) -> tuple[T, float]:
    """The call's result and its median time in milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        times.append((time.perf_counter() - start) * 1e3)
    return result, statistics.median(times)


def _load_of_slots(slots: npt.NDArray[np.int64], loads: Float64Array) -> Float64Array:
    """float64 [L, S] of slots [L, S, P], in which a shard may have an expert twice."""
    counts = (slots.reshape(len(slots), -1, 1) == np.arange(loads.shape[1])).sum(axis=1)
    return np.take_along_axis((loads / counts)[:, None], slots, axis=2).sum(axis=2)


def _excess(load: npt.ArrayLike) -> float:
    """Mean over layers."""
    return float(imbalance(load).excess.mean())


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.2f}"

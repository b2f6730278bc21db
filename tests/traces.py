"""Load traces made up for tests: Zipf loads that drift, two generations of the placement, links, sampled tokens.

Shape legend: L MoE layers, S shards, P slots per shard, E logical experts, K top-k, W windows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ep.load import PHASES, LinkWindow, PlacementChange, Window, round_trip_histogram
from ep.model import ModelSpec
from ep.placement import EMPTY, Placement, even_split
from ep.planning.plan import shard_load
from ep.presets import load_preset
from ep.trace import Trace, TraceWriter
from ep.trace_codec import Record
from ep.trace_header import TraceHeader, TraceSpec

Popularity = npt.NDArray[np.float64]
START = 1_795_423_000.0


@dataclass(frozen=True)
class TraceCase:
    """zipf: skew of the experts' popularity. drift: share of a window's popularity that is new in the next.

    change_at: window before which the placement is levelled; None for one generation. num_redundant: of that placement.
    num_samples: tokens of a window whose experts are recorded.
    """

    model: str = "deepseek-v3"
    synthetic: bool = False
    num_shards: int = 8
    num_nodes: int = 2
    num_windows: int = 24
    window_s: float = 10.0
    zipf: float = 0.9
    drift: float = 0.05
    change_at: int | None = 12
    num_redundant: int = 8
    num_samples: int = 16
    seed: int = 0

    @property
    def spec(self) -> ModelSpec:
        preset = load_preset(self.model)
        return preset.synthetic_spec if self.synthetic else preset.spec


SMALL = TraceCase(synthetic=True, num_shards=4, num_windows=6, change_at=3, num_redundant=4)


def make_trace(case: TraceCase = SMALL, source: str = "made-up.trace") -> Trace:
    """The same case gives the same trace."""
    spec, rng = case.spec, np.random.default_rng(case.seed)
    nodes = tuple(f"node-{shard_idx * case.num_nodes // case.num_shards}" for shard_idx in range(case.num_shards))
    placement = even_split(spec.num_moe_layers, spec.num_experts, case.num_shards)
    header = TraceHeader(
        created="2026-11-23T08:36:40+00:00",
        model=case.model,
        spec=TraceSpec.of(spec),
        placement=placement,
        node_of_shard=nodes,
        node_of_router=("node-0",),
        versions={"ep": "0.1.0", "vllm": "0.32.0", "torch": "2.13.0"},
    )
    popularity = {"prefill": _zipf(rng, spec, case.zipf)}
    popularity["decode"] = 0.7 * popularity["prefill"] + 0.3 * _zipf(rng, spec, case.zipf)
    windows: list[Window] = []
    changes: list[PlacementChange] = []
    for window_idx in range(case.num_windows):
        start = START + window_idx * case.window_s
        if window_idx == case.change_at:
            counts = np.asarray(sum(window.counts("all") for window in windows))
            levelled = level(counts, case.num_shards, case.num_redundant, placement.generation + 1)
            before, after = (shard_load(p, counts).max(axis=1).sum() for p in (placement, levelled))
            moved = int((levelled.slots[..., : placement.slots_per_shard] != placement.slots).sum())
            gain = float(1 - after / before)
            changes.append(PlacementChange(start, 0, levelled, "auto", moved * spec.expert_bytes, 3.2, gain))
            placement = levelled
        windows.append(_window(case, spec, rng, popularity, placement, start, window_idx))
        for phase, shares in popularity.items():
            popularity[phase] = (1 - case.drift) * shares + case.drift * _zipf(rng, spec, case.zipf)
    return Trace(source, header, tuple(windows), tuple(changes))


def write_trace(trace: Trace, path: Path) -> Path:
    """The trace as a file, its records in order of time."""
    with TraceWriter(path, trace.header) as writer:
        for record in in_order(trace):
            writer.append(record)
    return path


def in_order(trace: Trace) -> Iterable[Record]:
    return sorted(
        (*trace.changes, *trace.windows), key=lambda record: record.start if isinstance(record, Window) else record.time
    )


def level(counts: npt.NDArray[np.integer], num_shards: int, num_redundant: int, generation: int) -> Placement:
    """A plain good placement: one replica more for the hottest experts, then each to the emptiest shard with room."""
    num_layers, num_experts = counts.shape
    num_slots = -(-(num_experts + num_redundant) // num_shards)
    slots = np.full((num_layers, num_shards, num_slots), EMPTY, dtype=np.int32)
    for layer, loads in enumerate(counts):
        hottest = np.argsort(-loads, kind="stable")
        twice = set(hottest[:num_redundant].tolist())
        units = sorted(
            ((loads[e] / (2 if e in twice else 1), e) for e in range(num_experts) for _ in range(1 + (e in twice))),
            key=lambda unit: (-unit[0], unit[1]),
        )
        held: list[list[int]] = [[] for _ in range(num_shards)]
        load = [0.0] * num_shards
        for weight, expert in units:
            free = [s for s in range(num_shards) if len(held[s]) < num_slots and expert not in held[s]]
            shard = min(free, key=lambda s: (load[s], s))
            held[shard].append(expert)
            load[shard] += weight
        for shard, experts in enumerate(held):
            slots[layer, shard, : len(experts)] = experts
    return Placement(generation, num_experts, slots)


def same_record(one: Record, other: Record) -> bool:
    """Field by field, arrays with their dtypes."""
    if type(one) is not type(other):
        return False
    mine, others = vars(one), vars(other)
    if isinstance(one, Window) and isinstance(other, Window):
        mine, others = ({**vars(w), "links": [vars(link) for link in w.links]} for w in (one, other))
    return _same(mine, others)


def _same(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and one == other


def _zipf(rng: np.random.Generator, spec: ModelSpec, exponent: float) -> Popularity:
    """Shares of a layer's pairs, [L, E], each layer with hot experts of its own."""
    shares = np.arange(1, spec.num_experts + 1, dtype=np.float64) ** -exponent
    return rng.permuted(np.tile(shares / shares.sum(), (spec.num_moe_layers, 1)), axis=1)


def _window(
    case: TraceCase,
    spec: ModelSpec,
    rng: np.random.Generator,
    popularity: dict[str, Popularity],
    placement: Placement,
    start: float,
    window_idx: int,
) -> Window:
    num_tokens = {"prefill": int(rng.integers(3000, 9000)), "decode": int(rng.integers(1500, 2500))}
    counts = {
        phase: np.stack([rng.multinomial(num_tokens[phase] * spec.top_k, shares) for shares in popularity[phase]])
        for phase in PHASES[:2]
    }
    pairs = shard_load(placement, counts["prefill"] + counts["decode"]).sum(axis=0)
    requests = spec.num_moe_layers * 200
    links = tuple(
        LinkWindow(
            tokens=round(load * 0.8),
            pairs=round(load),
            requests=requests,
            bytes_out=round(load * 0.8) * spec.hidden_size * 2,
            bytes_in=round(load * 0.8) * spec.hidden_size * 2,
            compute_ns=round(load * 2_000),
            round_trips=round_trip_histogram(rng.lognormal(np.log(300 + 900 * load / pairs.max()), 0.3, requests)),
        )
        for load in pairs
    )
    # Gumbel top-k: K different experts of each token, by popularity; a token's subject favours every fourth expert.
    noise = rng.gumbel(size=(case.num_samples, *popularity["decode"].shape))
    subject = rng.integers(0, 4, size=(case.num_samples, 1, 1))
    noise += 1.5 * (np.arange(spec.num_experts) % 4 == subject)
    sampled = np.argsort(-(np.log(popularity["decode"]) + noise), axis=2)[..., : spec.top_k]
    return Window(
        start=start,
        seconds=case.window_s,
        first_step=window_idx * 200,
        num_steps=200,
        generation=placement.generation,
        num_prefill_tokens=num_tokens["prefill"],
        num_decode_tokens=num_tokens["decode"],
        prefill=counts["prefill"].astype(np.int64),
        decode=counts["decode"].astype(np.int64),
        links=links,
        sampled_ids=sampled.astype(np.int16),
        step_seconds_p50=0.04 + 0.001 * window_idx,
        step_seconds_p99=0.09,
    )

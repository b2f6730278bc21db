"""What a trace says about the load as it was served: phases, time, shards, links, changes of placement. Pure.

Shape legend: L MoE layers, S shards, E logical experts, N nodes with routers. Loads are pairs (token, expert); each
window's lie where the placement of its generation put them, an expert's in equal parts on its replicas. Excess and
evenness are the measures of `ep.planning.imbalance`, means over layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ep.load import PHASES, Int64Array, Phase, Window, round_trip_quantile, totals
from ep.placement import EMPTY
from ep.planning.imbalance import imbalance
from ep.planning.plan import shard_load
from ep.trace import Trace

Load = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PhaseNumbers:
    """tokens: that entered the model. busiest_layer: the checkpoint's number of the layer with the most imbalance."""

    phase: Phase
    tokens: int
    pairs: int
    excess: float
    evenness: float
    busiest_layer: int
    busiest_layer_excess: float


@dataclass(frozen=True)
class LayerNumbers:
    """One MoE layer over the whole trace, prefill and decode together. hottest_expert_load: times the layer's mean."""

    layer: int
    excess: float
    evenness: float
    busiest_shard: int
    hottest_expert: int
    hottest_expert_load: float


@dataclass(frozen=True)
class TimelinePoint:
    """One window. start: seconds since the first one began. An excess is None where the phase had no tokens."""

    start: float
    seconds: float
    router: int
    generation: int
    num_steps: int
    prefill_tokens: int
    decode_tokens: int
    prefill_excess: float | None
    decode_excess: float | None
    step_ms_p50: float
    step_ms_p99: float


@dataclass(frozen=True)
class ShardNumbers:
    """slots: filled ones of the current placement, all layers. load: pairs over the mean shard's, all layers together.
    busiest_layers: in how many layers no shard had more.
    compute_us: of the experts alone, mean of a request. Round trips are of one layer; None where there was none."""

    shard: int
    node: str
    slots: int
    load: float
    busiest_layers: int
    tokens: int
    pairs: int
    requests: int
    bytes_out: int
    bytes_in: int
    compute_us: float | None
    round_trip_us_p50: float | None
    round_trip_us_p99: float | None


@dataclass(frozen=True, eq=False)
class LinkBytes:
    """bytes_out, bytes_in: int64 [N, S], from the routers of a node to a shard and back. between_nodes: share of all
    bytes whose shard lies on another node than the router."""

    router_nodes: tuple[str, ...]
    bytes_out: Int64Array
    bytes_in: Int64Array
    between_nodes: float


@dataclass(frozen=True)
class ChangeNumbers:
    """A change of placement. start: seconds since the first window began. excess_before, excess_after: of all
    windows of the old and of the new generation; None where one of them has none."""

    start: float
    old_generation: int
    new_generation: int
    reason: str
    moved_bytes: int
    seconds: float
    predicted_gain: float
    excess_before: float | None
    excess_after: float | None


def served_load(trace: Trace, windows: Iterable[Window], phase: Phase) -> Load:
    """Load of each shard, float64 [L, S]."""
    spec, windows = trace.header.spec, list(windows)
    shape = (spec.num_moe_layers, spec.num_experts)
    load = np.zeros((spec.num_moe_layers, trace.header.placement.num_shards))
    for generation, placement in trace.placements.items():
        load += shard_load(placement, totals(windows, shape, phase, generation))
    return load


def phases(trace: Trace) -> tuple[PhaseNumbers, ...]:
    tokens = {
        "prefill": sum(window.num_prefill_tokens for window in trace.windows),
        "decode": sum(window.num_decode_tokens for window in trace.windows),
    }
    tokens["all"] = sum(tokens.values())
    found = []
    for phase in PHASES:
        load = served_load(trace, trace.windows, phase)
        even = imbalance(load)
        busiest = int(even.excess.argmax())
        found.append(
            PhaseNumbers(
                phase=phase,
                tokens=tokens[phase],
                pairs=round(load.sum()),
                excess=float(even.excess.mean()),
                evenness=float(even.evenness.mean()),
                busiest_layer=trace.header.spec.moe_layers[busiest],
                busiest_layer_excess=float(even.excess[busiest]),
            )
        )
    return tuple(found)


def layers(trace: Trace, counts: Int64Array) -> tuple[LayerNumbers, ...]:
    """counts: int64 [L, E], the trace's totals."""
    load = served_load(trace, trace.windows, "all")
    even = imbalance(load)
    rows = zip(trace.header.spec.moe_layers, load, even.excess, even.evenness, counts, strict=True)
    return tuple(
        LayerNumbers(
            layer=layer,
            excess=float(excess),
            evenness=float(evenness),
            busiest_shard=int(shards.argmax()),
            hottest_expert=int(experts.argmax()),
            hottest_expert_load=float(experts.max() / experts.mean()) if experts.any() else 0.0,
        )
        for layer, shards, excess, evenness, experts in rows
    )


def timeline(trace: Trace) -> tuple[TimelinePoint, ...]:
    """Windows in order of their start."""
    windows = sorted(trace.windows, key=lambda window: (window.start, window.router))
    placements = trace.placements

    def of_phase(window: Window, phase: Phase) -> float | None:
        counts = window.counts(phase)
        return _excess(shard_load(placements[window.generation], counts)) if counts.any() else None

    return tuple(
        TimelinePoint(
            start=window.start - windows[0].start,
            seconds=window.seconds,
            router=window.router,
            generation=window.generation,
            num_steps=window.num_steps,
            prefill_tokens=window.num_prefill_tokens,
            decode_tokens=window.num_decode_tokens,
            prefill_excess=of_phase(window, "prefill"),
            decode_excess=of_phase(window, "decode"),
            step_ms_p50=window.step_seconds_p50 * 1e3,
            step_ms_p99=window.step_seconds_p99 * 1e3,
        )
        for window in windows
    )


def shards(trace: Trace) -> tuple[ShardNumbers, ...]:
    per_layer = served_load(trace, trace.windows, "all")
    load = per_layer.sum(axis=0)
    busiest = np.bincount(per_layer.argmax(axis=1), minlength=len(load))
    slots = (trace.current.slots != EMPTY).sum(axis=(0, 2))
    found = []
    for shard_idx, node in enumerate(trace.header.node_of_shard):
        links = [window.links[shard_idx] for window in trace.windows]
        requests = sum(link.requests for link in links)
        round_trips = np.sum([link.round_trips for link in links], axis=0)
        found.append(
            ShardNumbers(
                shard=shard_idx,
                node=node,
                slots=int(slots[shard_idx]),
                load=float(load[shard_idx] / load.mean()),
                busiest_layers=int(busiest[shard_idx]),
                tokens=sum(link.tokens for link in links),
                pairs=sum(link.pairs for link in links),
                requests=requests,
                bytes_out=sum(link.bytes_out for link in links),
                bytes_in=sum(link.bytes_in for link in links),
                compute_us=sum(link.compute_ns for link in links) / requests / 1e3 if requests else None,
                round_trip_us_p50=round_trip_quantile(round_trips, 0.5),
                round_trip_us_p99=round_trip_quantile(round_trips, 0.99),
            )
        )
    return tuple(found)


def link_bytes(trace: Trace) -> LinkBytes:
    header = trace.header
    nodes = tuple(sorted(set(header.node_of_router)))
    out = np.zeros((len(nodes), header.placement.num_shards), dtype=np.int64)
    back = np.zeros_like(out)
    for window in trace.windows:
        node = nodes.index(header.node_of_router[window.router])
        out[node] += [link.bytes_out for link in window.links]
        back[node] += [link.bytes_in for link in window.links]
    apart = np.array(nodes)[:, None] != np.array(header.node_of_shard)[None, :]
    total = out + back
    return LinkBytes(nodes, out, back, float(total[apart].sum() / max(total.sum(), 1)))


def changes(trace: Trace) -> tuple[ChangeNumbers, ...]:
    start = min(window.start for window in trace.windows)

    def of_generation(generation: int) -> float | None:
        windows = [window for window in trace.windows if window.generation == generation]
        return _excess(served_load(trace, windows, "all")) if windows else None

    return tuple(
        ChangeNumbers(
            start=change.time - start,
            old_generation=change.old_generation,
            new_generation=change.new_generation,
            reason=change.reason,
            moved_bytes=change.moved_bytes,
            seconds=change.seconds,
            predicted_gain=change.predicted_gain,
            excess_before=of_generation(change.old_generation),
            excess_after=of_generation(change.new_generation),
        )
        for change in sorted(trace.changes, key=lambda change: change.time)
    )


def _excess(load: Load) -> float:
    return float(imbalance(load).excess.mean())

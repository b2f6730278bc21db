"""What the links of a served model carried, from the trace that its routers recorded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ep.report.served import phases, shards
from ep.trace import Trace


@dataclass(frozen=True)
class TrafficFigures:
    """tokens: that entered the model, prompts' and generated ones. excess: (max - mean) / mean of the shards' pairs,
    mean over layers. bytes_per_token: over all links, both ways; between_nodes: the part that leaves the router's node.
    """

    tokens: int
    excess: float
    bytes_per_token: float
    between_nodes: float


@dataclass(frozen=True)
class LinkFigures:
    """From the router to one shard. is_near: on the router's node. round_trip_us: of one layer, compute included;
    compute_us: of the experts alone, mean of a request. bytes_per_token: both ways, of each token of the model."""

    shard: int
    node: str
    is_near: bool
    requests: int
    round_trip_us_p50: float
    round_trip_us_p99: float
    compute_us: float
    bytes_per_token: float


def traffic(trace: Trace, since: float) -> tuple[TrafficFigures | None, tuple[LinkFigures, ...]]:
    """Of the windows that began after `since`, seconds since 1970. None where nothing was served since then."""
    windows = tuple(window for window in trace.windows if window.start >= since)
    if not windows:
        return None, ()
    trace = replace(trace, windows=windows)
    tokens = sum(window.num_prefill_tokens + window.num_decode_tokens for window in windows)
    near = set(trace.header.node_of_router)
    links = tuple(
        LinkFigures(
            shard=shard.shard,
            node=shard.node,
            is_near=shard.node in near,
            requests=shard.requests,
            round_trip_us_p50=round(shard.round_trip_us_p50 or 0.0, 1),
            round_trip_us_p99=round(shard.round_trip_us_p99 or 0.0, 1),
            compute_us=round(shard.compute_us or 0.0, 1),
            bytes_per_token=round((shard.bytes_out + shard.bytes_in) / tokens, 1),
        )
        for shard in shards(trace)
    )
    everything = next(phase for phase in phases(trace) if phase.phase == "all")
    far = sum(link.bytes_per_token for link in links if not link.is_near)
    total = sum(link.bytes_per_token for link in links)
    return TrafficFigures(tokens, round(everything.excess, 4), round(total, 1), round(far, 1)), links

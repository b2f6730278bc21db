"""What `ep bench nodes` says: its tables and plots."""

from __future__ import annotations

from ep.bench.greedy import ANSWER_LEN, NUM_PROMPTS
from ep.bench.nodes import NodesBench, NodesPoint
from ep.bench.page import Report, incomplete
from ep.bench.plot import Figure, Series
from ep.report.units import plural
from ep.sheet import Sheet

_MISSING = "-"


def describe(result: NodesBench) -> Report:
    options = result.options
    each = plural(options.shards_per_node, "shard")
    summary = f"{result.hosts}; {each} on each, {options.concurrency} requests at a time."
    if result.slow_host is not None:
        summary += f" The link of {result.slow_host[0]} has {result.slow_host[1]}, each way."
    if result.loss is not None:
        summary += (
            f" Host {result.loss.host} was cut off under load; `ep status` named it {result.loss.named_s:g} s later. "
            f"A request was told: {result.loss.error or 'nothing, it was answered'}."
        )
    report = Report("The same load on several nodes", _sheets(result), _figures(result), summary, _notes(result))
    return incomplete(report, result.incomplete)


def _sheets(result: NodesBench) -> tuple[Sheet, ...]:
    options = result.options
    title = f"{options.model}: {options.input_len} + {options.output_len} tokens, {options.num_prompts} requests, "
    title += f"median of {options.rounds} rounds"
    columns = (
        *("nodes", "shards", "tokens/s", "slowest to fastest", "efficiency", "TPOT p50, ms", "imbalance"),
        *("KB/token", "of it away", "tokens differ", "failed"),
    )
    note = (
        "Efficiency: tokens/s per node beside the first row's. Imbalance: (max - mean) / mean of pairs per shard. "
        "KB/token: between router and shards, both ways, of each token of the model; of it away: to shards on other "
        f"nodes. Tokens differ: of {NUM_PROMPTS} fixed prompts, alone and greedy, those whose {ANSWER_LEN} tokens are "
        "not the first row's."
    )
    if result.loss is not None:
        note = f"`ep status` named the lost host after {result.loss.named_s:g} s. {note}"
    rows = tuple(_row(point) for point in result.points)
    return (Sheet(title, columns, rows, note, text_columns=0, spare=(3, 6, 8)), _link_sheet(result))


def _row(point: NodesPoint) -> tuple[str, ...]:
    tpot = sorted(served.tpot_ms.p50 for served in point.rounds)
    of = point.traffic
    return (
        f"{point.num_nodes}{' (incomplete)' if point.incomplete else ''}",
        str(point.num_shards),
        f"{point.output_tokens_per_s:,.0f}",
        f"{point.slowest:,.0f} to {point.fastest:,.0f}",
        f"{point.efficiency:.2f}",
        f"{tpot[len(tpot) // 2]:.1f}" if tpot else _MISSING,
        f"{of.excess:.1%}" if of else _MISSING,
        f"{of.bytes_per_token / 1e3:.1f}" if of else _MISSING,
        f"{of.between_nodes / of.bytes_per_token:.0%}" if of and of.bytes_per_token else _MISSING,
        str(point.num_different),
        str(point.num_failed),
    )


def _link_sheet(result: NodesBench) -> Sheet:
    slow = result.slow_host[0] if result.slow_host is not None else None
    rows = tuple(
        (
            str(point.num_nodes),
            str(link.shard),
            f"{link.node}{' (slowed)' if link.node == slow else ''}",
            "same node" if link.is_near else "network",
            f"{link.requests:,}",
            f"{link.round_trip_us_p50 / 1e3:.2f}",
            f"{link.round_trip_us_p99 / 1e3:.2f}",
            f"{link.compute_us / 1e3:.2f}",
            f"{link.bytes_per_token / 1e3:.2f}",
        )
        for point in result.points
        for link in point.links
    )
    columns = ("nodes", "shard", "node", "over", "round trips", "p50, ms", "p99, ms", "compute, ms", "KB/token")
    note = "A round trip is one layer's: dispatch, the shard's queue and compute, combine. Compute: the experts alone."
    return Sheet("Links from the router to each shard", columns, rows, note, text_columns=4, spare=(3, 4))


def _figures(result: NodesBench) -> tuple[Figure, ...]:
    points = [point for point in result.points if point.rounds]
    if not points:
        return ()
    names = tuple(str(point.num_nodes) for point in points)
    speed = Series(
        "tokens/s",
        names,
        tuple(point.output_tokens_per_s for point in points),
        tuple(point.slowest for point in points),
        tuple(point.fastest for point in points),
    )
    figures = [Figure("speed", "Output tokens per second", "nodes", "tokens/s", (speed,), "bars")]
    most = max(points, key=lambda point: point.num_nodes)
    shards = tuple(f"{link.shard}: {link.node}" for link in most.links)
    trips = (
        Series("p50", shards, tuple(link.round_trip_us_p50 / 1e3 for link in most.links)),
        Series("p99", shards, tuple(link.round_trip_us_p99 / 1e3 for link in most.links)),
    )
    title = f"Round trips of a layer on {most.num_nodes} nodes"
    return (*figures, Figure("links", title, "shard: node", "ms", trips, "bars"))


def _notes(result: NodesBench) -> tuple[str, ...]:
    if result.host_kind == "joined":
        return ()
    return (
        "All hosts are on one machine and share its cores: more hosts are more processes on the same cores, so the "
        "efficiency says what the messages and processes cost, and nothing about how real hosts scale.",
    )

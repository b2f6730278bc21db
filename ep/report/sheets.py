"""The tables of a report, ready to show: what the terminal and the page have in common. Pure."""

from __future__ import annotations

from ep.report.numbers import ReportNumbers
from ep.report.plans import CURRENT, FIRST, PLANNED, PlacementNumbers
from ep.report.survival import SurvivalNumbers
from ep.report.units import MISSING, count, listing, micros, percent, plural, seconds, size, times
from ep.sheet import Sheet

EXCESS, EVENNESS = "(max-mean)/mean", "mean/max"


def phase_sheet(numbers: ReportNumbers) -> Sheet:
    rows = (
        (
            phase.phase,
            count(phase.tokens),
            count(phase.pairs),
            percent(phase.excess),
            percent(phase.evenness),
            str(phase.busiest_layer),
            percent(phase.busiest_layer_excess),
        )
        for phase in numbers.phases
    )
    return Sheet(
        "Imbalance of the shards, as served",
        ("phase", "tokens", "pairs", EXCESS, EVENNESS, "least even layer", "imbalance there"),
        tuple(rows),
        "Pairs of (token, expert) per shard, every window under the placement that it ran with. Measures are means "
        "over layers, of sums over windows, which are more even than single steps.",
    )


def placement_sheet(numbers: ReportNumbers) -> Sheet:
    rows = [_placement_row(placement) for placement in numbers.plans.placements]
    bounds = numbers.plans.bounds
    for name, excess, evenness in (
        ("plan, split at will", bounds.at_will_excess, bounds.at_will_evenness),
        ("bound", bounds.excess, bounds.evenness),
    ):
        rows.append((name, MISSING, percent(excess, 2), percent(evenness, 2), *[MISSING] * 3))
    return Sheet(
        "Placements, judged on the load of the whole trace",
        ("placement", "redundant", EXCESS, EVENNESS, "over the bound", "experts to move", "bytes to move"),
        tuple(rows),
        "Measures are means over layers, redundant slots are per layer. Within 5%: the busiest shards may have that "
        "much more than in the plan where it saves moves. By node: experts of a group on one node, for models whose "
        "tokens choose few groups. Bound: no placement with as many slots has less load on its busiest shard, an "
        "expert's tokens split equally over its replicas. Split at will: the router splits them best, by an LP.",
        spare=(1,),
    )


def _placement_row(placement: PlacementNumbers) -> tuple[str, ...]:
    recorded = placement.name in (FIRST, CURRENT)
    return (
        f"{placement.name} (gen. {placement.generation})" if recorded else placement.name,
        str(placement.num_redundant),
        percent(placement.excess, 2),
        percent(placement.evenness, 2),
        percent(placement.over_bound, 2),
        MISSING if recorded else count(placement.moves),
        MISSING if recorded else size(placement.moved_bytes),
    )


def hot_sheet(numbers: ReportNumbers) -> Sheet:
    rows = (
        (
            str(expert.layer),
            str(expert.expert),
            times(expert.load),
            percent(expert.share),
            count(expert.prefill_pairs),
            count(expert.decode_pairs),
            listing(expert.shards),
            listing(expert.planned_shards),
        )
        for expert in numbers.hottest
    )
    return Sheet(
        "Hottest experts",
        ("layer", "expert", "× mean", "of its layer", "prefill pairs", "decode pairs", "shards", "planned"),
        tuple(rows),
        "Load beside the mean expert of the layer; the shards that hold a replica, now and in the plan.",
        text_columns=2,
        spare=(3,),
    )


def shard_sheet(numbers: ReportNumbers) -> Sheet:
    rows = (
        (
            str(shard.shard),
            shard.node,
            f"{shard.load:.2f}×",
            str(shard.busiest_layers),
            count(shard.slots),
            count(shard.tokens),
            count(shard.pairs),
            size(shard.bytes_out),
            size(shard.bytes_in),
            micros(shard.round_trip_us_p50),
            micros(shard.round_trip_us_p99),
            micros(shard.compute_us),
        )
        for shard in numbers.shards
    )
    columns = (
        "shard",
        "node",
        "× mean",
        "busiest in",
        "slots",
        "tokens",
        "pairs",
        "sent",
        "received",
        "p50",
        "p99",
        "compute",
    )
    note = (
        "Busiest in: layers in which no shard had more pairs. Tokens: rows sent to the shard, a token once per "
        "layer. p50, p99: one layer's round trip, from dispatch to answer. Compute: of the experts alone, mean of "
        "a request."
    )
    spare = tuple(columns.index(name) for name in ("slots", "pairs", "received", "compute"))
    return Sheet("Shards", columns, tuple(rows), note, text_columns=2, spare=spare)


def change_sheet(numbers: ReportNumbers) -> Sheet:
    rows = (
        (
            f"{change.old_generation} to {change.new_generation}",
            change.reason,
            seconds(change.start),
            seconds(change.seconds),
            size(change.moved_bytes),
            percent(change.predicted_gain),
            percent(change.excess_before),
            percent(change.excess_after),
        )
        for change in numbers.changes
    )
    columns = ("generation", "reason", "at", "took", "moved", "predicted gain", "before", "after")
    note = f"Before, after: {EXCESS} of all windows of the old and the new generation."
    return Sheet("Changes of placement", columns, tuple(rows), note, text_columns=2)


def what_if_sheet(numbers: ReportNumbers) -> Sheet:
    rows = (
        (
            str(row.num_shards),
            str(row.num_redundant),
            str(row.slots_per_shard),
            percent(row.excess, 2),
            percent(row.evenness, 2),
            percent(row.over_bound, 2),
            size(row.extra_bytes_per_shard),
            count(row.kv_tokens_lost),
        )
        for row in numbers.what_if
    )
    return Sheet(
        "What if: other numbers of shards and replicas",
        ("shards", "redundant", "slots", EXCESS, EVENNESS, "over the bound", "extra memory", "KV tokens lost"),
        tuple(rows),
        "A plan for each, judged on the load of the whole trace. Slots are of the fullest shard and per layer, as the "
        "redundant ones; extra memory is of that shard over all layers. KV tokens lost: what that memory would hold at "
        f"{size(numbers.trace.kv_bytes_per_token)} a token (bf16, all layers).",
        text_columns=2,
    )


def survival_sheet(numbers: ReportNumbers) -> Sheet:
    lost = sorted({loss.num_lost for row in numbers.survivability for loss in row.losses})
    rows = (_survival_row(row, lost) for row in numbers.survivability)
    columns = (
        "placement",
        "losing",
        "tolerated",
        *(f"any {k}" for k in lost),
        "any 1, per GB",
        "on one only",
        "redundant",
    )
    return Sheet(
        "Survivability",
        columns,
        tuple(rows),
        "Tolerated: losses of which every combination leaves a copy of every expert. Any k: share of the "
        "combinations of k that do (≈ of a sample); per GB: divided by the gigabytes of redundant weights. On one "
        "only: experts without a copy elsewhere. Apart: replicas on different nodes. Twice: two replicas of each, "
        "whatever its load.",
        text_columns=2,
    )


def _survival_row(row: SurvivalNumbers, lost: list[int]) -> tuple[str, ...]:
    survived = {loss.num_lost: ("" if loss.exact else "≈") + percent(loss.survived) for loss in row.losses}
    first = row.losses[0].per_gb if row.losses else None
    return (
        row.name,
        f"{row.unit}s",
        str(row.tolerated),
        *(survived.get(k, MISSING) for k in lost),
        percent(first, 3),
        percent(row.single),
        size(row.redundant_bytes),
    )


def headline(numbers: ReportNumbers) -> tuple[tuple[str, str, str], ...]:
    """The few figures that stand on top: (what, figure, where)."""
    hot = numbers.hottest[0]
    served = {phase.phase: phase for phase in numbers.phases}
    by_name = {placement.name: placement for placement in numbers.plans.placements}
    busiest = max(numbers.shards, key=lambda shard: shard.load)
    return (
        *_slowest_link(numbers),
        (
            "hottest expert",
            f"layer {hot.layer}, expert {hot.expert}",
            f"{times(hot.load)} the mean; on shard {listing(hot.shards)}",
        ),
        (
            "busiest shard",
            f"shard {busiest.shard}",
            f"{busiest.load:.2f}× the mean; most in {busiest.busiest_layers} of {numbers.trace.num_moe_layers} layers",
        ),
        (
            "imbalance served",
            percent(served["all"].excess),
            f"prefill {percent(served['prefill'].excess)}, decode {percent(served['decode'].excess)}",
        ),
        (
            "current placement",
            percent(by_name[CURRENT].excess),
            f"generation {by_name[CURRENT].generation}, on all load",
        ),
        (
            "planned placement",
            percent(by_name[PLANNED].excess),
            f"bound {percent(numbers.plans.bounds.excess)}; {size(by_name[PLANNED].moved_bytes)} to move",
        ),
    )


def _slowest_link(numbers: ReportNumbers) -> tuple[tuple[str, str, str], ...]:
    """Beside the fastest; nothing where there are no two to compare."""
    timed = [(shard.round_trip_us_p50, shard) for shard in numbers.shards if shard.round_trip_us_p50 is not None]
    if len(timed) < 2:
        return ()
    (fast, fastest), (slow, slowest) = (pick(timed, key=lambda one: one[0]) for pick in (min, max))
    beside = f"{times(slow / fast)} shard {fastest.shard}'s on {fastest.node}"
    return (("slowest link", f"shard {slowest.shard} on {slowest.node}", f"round trip p50 {micros(slow)}, {beside}"),)


def describe(numbers: ReportNumbers) -> str:
    """How much was recorded, and of what."""
    trace = numbers.trace
    parts = (
        f"{plural(trace.num_windows, 'window')} in {seconds(trace.seconds)}",
        plural(trace.num_steps, "step"),
        f"{plural(trace.num_moe_layers, 'MoE layer')} × {trace.experts_per_layer} experts, top {trace.top_k}",
        f"{plural(trace.num_shards, 'shard')} on {plural(len(trace.nodes), 'node')}",
        f"generation {trace.generation}",
    )
    return ", ".join(parts)

"""`ep rebalance`: level a running instance's shards by the load that its routers saw."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ep.instances import choose, coordinators

if TYPE_CHECKING:
    from ep.cluster.rebalancer import Outcome


@dataclass(frozen=True)
class RebalanceCommand:
    """The options of `ep rebalance`. now: also where it does not pay back. auto: turn automatic rebalancing on or off
    instead."""

    address: str = "auto"
    instance: str | None = None
    now: bool = False
    auto: bool | None = None
    as_json: bool = False


def run(options: RebalanceCommand) -> int:
    """Returns the exit code: 1 if a move failed. Raises OptionError."""
    import ray

    with coordinators(options.address) as instances:
        name, coordinator = choose(instances, options.instance)
        if options.auto is not None:
            ray.get(coordinator.set_auto_rebalance.remote(options.auto))
        else:
            with Console(stderr=True).status(f"{name}: planning, and moving experts where that pays back"):
                outcome: Outcome = ray.get(coordinator.rebalance.remote(options.now))
    if options.auto is not None:
        _say(options, {"instance": name, "auto_rebalance": options.auto})
        return 0
    if options.as_json:
        print(json.dumps({"instance": name} | asdict(outcome)))
    else:
        _show(name, outcome)
    return 1 if outcome.outcome == "failed" else 0


def _say(options: RebalanceCommand, values: dict[str, Any]) -> None:
    if options.as_json:
        print(json.dumps(values))
    else:
        print(f"{values['instance']}: automatic rebalancing is {'on' if values['auto_rebalance'] else 'off'}")


def _show(name: str, outcome: Outcome) -> None:
    console = Console(highlight=False)
    console.print(f"[bold]{name}[/bold]: {outcome.outcome}, generation {outcome.generation}")
    console.print(outcome.reason)
    if not outcome.num_steps:
        return
    table = Table("", "before", "planned", title="pairs on the busiest shard above the mean")
    table.add_row("(max - mean) / mean", f"{outcome.excess_before:.1%}", f"{outcome.excess_after:.1%}")
    table.add_row("at most above the optimum", "", f"{outcome.gap_to_bound:.1%}")
    console.print(table)
    moved = "moved" if outcome.outcome == "moved" else "to move"
    console.print(
        f"{outcome.num_transfers} experts ({outcome.num_bytes / 1e6:.1f} MB) {moved} in {outcome.num_steps} steps"
        + (f", {outcome.seconds:.1f} s, {outcome.probed} slots probed" if outcome.outcome == "moved" else "")
    )
    if outcome.outcome == "refused":
        console.print("[dim]--now moves all the same[/dim]")

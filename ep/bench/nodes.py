"""`ep bench nodes`: the same load on different numbers of nodes of one cluster, and what every link carries.

The hosts are made on this machine (ep/bench/hosts) unless a Ray cluster is named. All numbers of nodes are measured on
the one cluster, its first nodes; each server first answers the same prompts alone, whose tokens must not depend on the
nodes.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from ep.bench.client import Client, Load, Served
from ep.bench.conditions import Conditions, conditions
from ep.bench.greedy import greedy_tokens
from ep.bench.hosts.cluster import HostCluster, host_cluster, joined_cluster
from ep.bench.hosts.link_quality import LinkQuality
from ep.bench.hosts.loss import HostLoss, lose_later
from ep.bench.hosts.serving import Spread, lost_hosts, start_server
from ep.bench.links import LinkFigures, TrafficFigures, traffic
from ep.errors import EpError, OptionError
from ep.report.units import plural
from ep.target import Target, resolve_target
from ep.terminal import Terminal, state_dir
from ep.trace import read_trace

_TRACE_WINDOW_S = 1.0


@dataclass(frozen=True)
class NodesBenchOptions:
    """address: a running Ray cluster, None for hosts on this machine, max(nodes) of them. The link of slow_host (by
    default of the last) has delay_ms, loss and rate_mbit. lose_host_after_s: the last host is cut off so many seconds
    after the requests of the last round began."""

    model: str = "deepseek-v3"
    checkpoint: str | None = None
    nodes: tuple[int, ...] = (1, 2, 4)
    shards_per_node: int = 1
    address: str | None = None
    concurrency: int = 16
    input_len: int = 32
    output_len: int = 64
    num_prompts: int = 64
    rounds: int = 3
    slow_host: int | None = None
    delay_ms: float = 0.0
    loss: float = 0.0
    rate_mbit: float | None = None
    lose_host_after_s: float | None = None
    seed: int = 0
    ready_s: float = 600.0
    output: str | None = None
    page: str | None = None

    @property
    def quality(self) -> LinkQuality:
        return LinkQuality(self.delay_ms, self.loss, self.rate_mbit)

    @property
    def slowed(self) -> int | None:
        """Which host's link is; None for none."""
        if self.quality == LinkQuality():
            return None
        return max(self.nodes) - 1 if self.slow_host is None else self.slow_host


@dataclass(frozen=True)
class NodesPoint:
    """One number of nodes. output_tokens_per_s: the median of the rounds, slowest and fastest their range. efficiency:
    beside the first point's, per node. num_different: prompts whose tokens are not the first point's. links: by shard.
    incomplete: why the figures are not of all rounds and all requests, None where they are."""

    num_nodes: int
    num_shards: int
    start_s: float
    rounds: tuple[Served, ...]
    output_tokens_per_s: float
    slowest: float
    fastest: float
    efficiency: float
    num_failed: int
    num_different: int
    traffic: TrafficFigures | None
    links: tuple[LinkFigures, ...]
    incomplete: str | None


@dataclass(frozen=True)
class NodesBench:
    """hosts: what they are. slow_host: the address whose link is slowed, and how, None for none. loss: of a host, where
    one was cut off. incomplete: why not everything was measured, None where it was."""

    conditions: Conditions
    options: NodesBenchOptions
    hosts: str
    host_kind: str
    slow_host: tuple[str, str] | None
    logs: str
    points: tuple[NodesPoint, ...]
    loss: HostLoss | None
    incomplete: str | None


@dataclass
class _Run:
    """What one number of nodes has given so far."""

    spread: Spread
    start_s: float = 0.0
    tokens: list[list[int]] = field(default_factory=list)
    rounds: list[Served] = field(default_factory=list)
    measured_from: float = 0.0
    loss: HostLoss | None = None
    incomplete: str | None = None


def run(options: NodesBenchOptions, terminal: Terminal) -> NodesBench:
    """What was measured until something ended it. Raises OptionError, CheckpointError, and ClusterError for hosts that
    cannot be made."""
    _check(options)
    at = conditions()
    target = resolve_target(options.model, options.checkpoint, options.checkpoint is None, terminal)
    logs = state_dir() / "logs" / f"bench-nodes-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    logs.mkdir(parents=True)
    terminal.say(f"logs: {logs}")
    slowed = options.slowed
    points: list[NodesPoint] = []
    tokens: list[list[int]] = []
    loss: HostLoss | None = None
    with ExitStack() as stack:
        if options.address is not None:
            cluster = joined_cluster(options.address)
        else:
            with terminal.console.status("starting the hosts"):
                qualities = {} if slowed is None else {slowed: options.quality}
                cluster = stack.enter_context(host_cluster(max(options.nodes), options.shards_per_node, qualities))
        terminal.say(cluster.describe())
        client = stack.enter_context(Client(logs))
        bar, task = stack.enter_context(terminal.progress("measuring", total=len(options.nodes) * (options.rounds + 2)))
        for num_nodes in options.nodes:
            bar.update(task, description=plural(num_nodes, "node"))
            done = _measure(options, target, cluster, num_nodes, client, logs, lambda: bar.advance(task))
            tokens = tokens or done.tokens
            points.append(_point(options, done, points, tokens, logs))
            terminal.say(_sentence(points[-1]))
            loss = done.loss
            if done.incomplete is not None:
                break
    return NodesBench(
        conditions=at,
        options=options,
        hosts=cluster.describe(),
        host_kind=cluster.kind,
        slow_host=None if slowed is None else (cluster.addresses[slowed], options.quality.describe()),
        logs=str(logs),
        points=tuple(points),
        loss=loss,
        incomplete=points[-1].incomplete,
    )


def _check(options: NodesBenchOptions) -> None:
    if options.address is not None:
        for name in ("slowed", "lose_host_after_s"):
            if getattr(options, name) is not None:
                raise OptionError(f"--address {options.address}: links of a running cluster cannot be slowed or cut")
    if options.slow_host is not None and options.slow_host >= max(options.nodes):
        raise OptionError(f"--slow-host {options.slow_host}: hosts are numbered 0 to {max(options.nodes) - 1}")
    if options.slow_host is not None and options.slowed is None:
        raise OptionError(f"--slow-host {options.slow_host}: expected one of --delay-ms, --loss and --rate-mbit too")
    if options.lose_host_after_s is not None and options.nodes[-1] != max(options.nodes):
        raise OptionError(f"--nodes {options.nodes}: the last number must be the largest where its last host is lost")
    if options.output is not None and not Path(options.output).resolve().parent.is_dir():
        raise OptionError(f"--output {options.output}: no such directory")


def _measure(
    options: NodesBenchOptions,
    target: Target,
    cluster: HostCluster,
    num_nodes: int,
    client: Client,
    logs: Path,
    advance: Callable[[], None],
) -> _Run:
    """Serves on the first num_nodes nodes, and ends the server. What goes wrong ends it early."""
    done = _Run(Spread(num_nodes * options.shards_per_node, num_nodes))
    server = None
    try:
        trace = logs / f"nodes-{num_nodes}.trace"
        flags = ("--trace-window", str(_TRACE_WINDOW_S))
        server = start_server(cluster, options.model, target.checkpoint, done.spread, trace, logs, flags)
        done.start_s = round(server.wait_until_ready(options.ready_s), 1)
        advance()
        done.tokens = greedy_tokens(server.url, target.name, options.seed)
        for round_idx in range(-1, options.rounds):
            if round_idx == 0:
                done.measured_from = time.time()
            is_last = (num_nodes, round_idx) == (options.nodes[-1], options.rounds - 1)
            after_s, losing = options.lose_host_after_s, None
            if after_s is not None and is_last:
                losing = lose_later(cluster, num_nodes - 1, server, _warm_up_tokens(options), after_s)
            name = f"{num_nodes}-{round_idx if round_idx >= 0 else 'warm-up'}"
            load = _load(options, round_idx)
            served = client.run(load, server.url, target.name, str(target.checkpoint), name, may_fail=round_idx >= 0)
            advance()
            if round_idx >= 0:
                done.rounds.append(served)
            if losing is not None:
                done.loss = losing.result()
            done.incomplete = _trouble(cluster, served)
            if done.incomplete is not None:
                break
    except KeyboardInterrupt:
        done.incomplete = "interrupted"
    except (EpError, OSError) as error:
        done.incomplete = "; ".join([str(error), *_lost(cluster)])
    finally:
        if server is not None:
            server.stop()
    return done


def _load(options: NodesBenchOptions, round_idx: int) -> Load:
    """Every round has prompts of its own, the same for every number of nodes."""
    seed = options.seed + round_idx + 1
    return Load(options.concurrency, options.input_len, options.output_len, options.num_prompts, seed)


def _warm_up_tokens(options: NodesBenchOptions) -> int:
    """That the client has made before it measures: its first trial, and `concurrency` requests."""
    return (1 + options.concurrency) * options.output_len


def _trouble(cluster: HostCluster, served: Served) -> str | None:
    """Why the bench must end here, if it must: requests that failed, or a host that is gone."""
    failed = [f"{served.num_failed} requests failed"] if served.num_failed else []
    return "; ".join([*_lost(cluster), *failed]) or None


def _lost(cluster: HostCluster) -> list[str]:
    try:
        return lost_hosts(cluster)
    except EpError:  # nothing is served any more, and the reason is known already
        return []


def _point(
    options: NodesBenchOptions, done: _Run, before: list[NodesPoint], tokens: list[list[int]], logs: Path
) -> NodesPoint:
    """tokens: those of the first point."""
    speeds = [served.output_tokens_per_s for served in done.rounds] or [0.0]
    speed, num_nodes = statistics.median(speeds), done.spread.num_nodes
    base = before[0] if before else None
    efficiency = 1.0 if base is None else speed / num_nodes / (base.output_tokens_per_s / base.num_nodes)
    figures: TrafficFigures | None = None
    links: tuple[LinkFigures, ...] = ()
    if done.rounds:
        figures, links = traffic(read_trace(logs / f"nodes-{num_nodes}.trace"), done.measured_from)
    return NodesPoint(
        num_nodes=num_nodes,
        num_shards=done.spread.num_shards,
        start_s=done.start_s,
        rounds=tuple(done.rounds),
        output_tokens_per_s=round(speed, 1),
        slowest=round(min(speeds), 1),
        fastest=round(max(speeds), 1),
        efficiency=round(efficiency, 4),
        num_failed=sum(served.num_failed for served in done.rounds),
        num_different=sum(mine != first for mine, first in zip(done.tokens, tokens)),
        traffic=figures,
        links=links,
        incomplete=done.incomplete,
    )


def _sentence(point: NodesPoint) -> str:
    told = f"{plural(point.num_nodes, 'node')}: {point.output_tokens_per_s:.0f} tokens/s"
    return told if point.incomplete is None else f"{told}, [red]incomplete[/red]: {point.incomplete}"

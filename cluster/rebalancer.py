"""Plans a better placement from the load that routers saw, and moves to it while they serve.

    loads ─> plan ─> payback? ─> per step: shards prepare ─> routers adopt ─> shards drop the old generation
A step that fails before the routers adopt it leaves the old generation serving. A generation's number is used once: a
shard that missed the end of a failed move cannot take its slots for those of another.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import ray

from ep.errors import ClusterError
from ep.link import NAMESPACE, Link
from ep.load import PlacementChange
from ep.migration import Payback, Step, payback, plan_steps
from ep.placement import EMPTY, Placement, without_spares
from ep.planning.imbalance import imbalance
from ep.planning.plan import Plan, plan, shard_load
from ep.planning.request import PlanRequest

if TYPE_CHECKING:
    from ep.transport.base import Endpoint

log = logging.getLogger(__name__)
WINDOW_S = 60.0
"""Load older than this says little about the load to come."""
MIN_PAIRS_PER_EXPERT = 8
"""Fewer counts than these on average are noise that a plan would chase."""
SLACKS = (0.0, 0.02, 0.05, 0.1)
"""How much busier than it could be a plan may leave a shard, to move fewer experts: the last percents cost most. The
one that is worth most over the horizon is taken."""
NICENESS = 10
PREPARE_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class RebalanceOptions:
    """num_redundant: replicas beyond one slot for each expert that a plan may use. auto: rebalance by itself every
    interval_s seconds where that pays back within horizon_s seconds."""

    num_redundant: int = 0
    auto: bool = False
    interval_s: float = 60.0
    horizon_s: float = 300.0


@dataclass(frozen=True)
class Outcome:
    """What an attempt came to. outcome: moved, refused, failed or nothing (to move, or not enough load seen).

    excess_before, excess_after: (max - mean) / mean of pairs over shards, mean over layers, by the same loads.
    gap_to_bound: how far from optimal the plan may be. seconds: from the first copy to the last shard's drop.
    """

    outcome: str
    reason: str
    time: float
    generation: int
    excess_before: float = 0.0
    excess_after: float = 0.0
    gap_to_bound: float = 0.0
    num_transfers: int = 0
    num_steps: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    gain_s_per_s: float = 0.0
    cost_s: float = 0.0
    probed: int = 0


class Members(Protocol):
    """What a rebalancer needs of the coordinator."""

    def is_serving(self) -> bool:
        """Whether all shards and routers are there."""
        ...

    def actors(self) -> list[Any]:
        """Of all shards, by index. Raises ClusterError if one is not up."""
        ...

    def endpoints(self) -> list[Endpoint]: ...

    def expect(self, placement: Placement | None) -> None:
        """Shards that start from now on hold this placement beside the current one."""
        ...

    def go_over(self, placement: Placement) -> None:
        """This placement is the current one."""
        ...


class Rebalancer:
    """One attempt after the other, whoever asks for them."""

    def __init__(self, link: Link, placement: Placement, members: Members, options: RebalanceOptions) -> None:
        self._link = link
        self._members = members
        self._options = options
        self._placement = placement
        self._last_generation = placement.generation
        self._asked: queue.SimpleQueue[tuple[bool, str, Future[Outcome]]] = queue.SimpleQueue()
        self._counts: Counter[str] = Counter()
        self._last: Outcome | None = None
        self._bytes_per_s = 0.0
        self._auto = options.auto
        threading.Thread(target=self._run, daemon=True, name="rebalance").start()

    def status(self) -> dict[str, Any]:
        return {
            "auto_rebalance": self._auto,
            "rebalances": dict(self._counts),
            "last_rebalance": None if self._last is None else asdict(self._last),
        }

    def set_auto(self, auto: bool) -> None:
        self._auto = auto

    def rebalance(self, force: bool = False, reason: str = "asked for") -> Outcome:
        """Plans and, if that pays back or is forced, moves. Never raises: the outcome says what happened."""
        future: Future[Outcome] = Future()
        self._asked.put((force, reason, future))
        return future.result()

    def _run(self) -> None:
        """One attempt after the other, on a thread that leaves the cores to those who serve."""
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while True:
            try:
                force, reason, future = self._asked.get(timeout=self._options.interval_s)
            except queue.Empty:
                if self._auto and self._members.is_serving():  # nothing has failed while they load
                    self._try(False, "automatic")
                continue
            future.set_result(self._try(force, reason))

    def _try(self, force: bool, reason: str) -> Outcome:
        try:
            outcome = self._attempt(force, reason)
        except Exception as error:  # whatever it was, the old generation serves and the next attempt may do better
            log.warning("rebalance failed: %s", error, exc_info=not isinstance(error, ClusterError))
            text = (str(getattr(error, "cause", None) or error).strip().splitlines() or ["?"])[-1]
            outcome = self._outcome("failed", f"{text}; generation {self._placement.generation} goes on serving")
        self._last = outcome
        self._counts[outcome.outcome] += 1
        log.info("rebalance (%s): %s", reason, outcome)
        return outcome

    def _attempt(self, force: bool, reason: str) -> Outcome:
        current = self._placement
        actors, endpoints = self._members.actors(), self._members.endpoints()
        if not actors:
            return self._outcome("refused", "the shards are in the router's own process (--transport local)")
        load = self._loads()
        if load.counts.sum() < MIN_PAIRS_PER_EXPERT * load.counts.size:
            return self._outcome("nothing", f"{int(load.counts.sum())} pairs seen: too few to plan from")
        nodes = [endpoint.node_id for endpoint in endpoints]
        slot_bytes = ray.get(actors[0].slot_bytes.remote())
        speed = self._bytes_per_s or self._link_speed(current, actors, endpoints)
        planned, steps, verdict = self._best(load, nodes, slot_bytes, speed, force)
        if not steps:
            return self._outcome("nothing", "the placement is as good as a plan for the load that was seen")
        load_now = shard_load(current, load.counts)
        before = float(np.mean(imbalance(load_now).excess))
        gain = 1 - float(planned.shard_load.max(axis=1).sum() / load_now.max(axis=1).sum())
        found = self._outcome("refused", verdict.describe(), planned, verdict, before)
        found = replace(found, num_steps=len(steps), num_transfers=_num_transfers(steps))
        if not force and not verdict.worthwhile:
            return found
        start, probed = time.monotonic(), 0
        for step in self._numbered(steps):
            probed += self._go(step, actors, endpoints, reason, gain)
        return replace(
            found,
            outcome="moved",
            generation=self._placement.generation,
            seconds=round(time.monotonic() - start, 3),
            probed=probed,
        )

    def _best(
        self, load: Load, nodes: list[str], slot_bytes: int, speed: float, force: bool
    ) -> tuple[Plan, tuple[Step, ...], Payback]:
        """Of plans that move more or less, the one that saves most over the horizon, its copies taken off; the most
        level one if forced."""
        current, horizon_s = self._placement, self._options.horizon_s
        pair_s = load.compute_ns / max(load.pairs, 1) * 1e-9
        found = []
        for slack in SLACKS[:1] if force else SLACKS:
            request = PlanRequest(
                num_shards=current.num_shards,
                num_redundant=self._options.num_redundant,
                node_of_shard=tuple(sorted(set(nodes)).index(node) for node in nodes),
                generation=current.generation + 1,
                previous=without_spares(current),
                slack=slack,
            )
            planned = plan(load.counts, request)
            steps = plan_steps(current, planned.placement, slot_bytes, nodes)
            num_bytes = sum(step.num_bytes for step in steps)
            verdict = payback(
                load.counts, current, planned.placement, pair_s, load.seconds, num_bytes, speed, horizon_s
            )
            found.append((planned, steps, verdict))
        return max(found, key=lambda one: one[2].gain * horizon_s - one[2].cost_s)

    def _go(
        self, step: Step, actors: Sequence[Any], endpoints: Sequence[Endpoint], reason: str, gain: float
    ) -> int:
        """One generation on. gain: share of the busiest shards' load that the whole move is to take away. Returns how
        many slots were probed."""
        start, old, new = time.monotonic(), self._placement, step.placement
        table = new.to_dict()
        self._members.expect(new)
        preparing = [
            actor.prepare.remote(table, [t for t in step.transfers if t.to_shard == shard_idx], endpoints)
            for shard_idx, actor in enumerate(actors)
        ]
        try:
            moved = ray.get(preparing, timeout=PREPARE_TIMEOUT_S)
        except Exception as error:
            self._members.expect(None)
            _settle(preparing)  # or a shard that is not done yet would admit the generation after it was dropped
            _settle([actor.drop.remote(new.generation) for actor in actors])
            if isinstance(error, ray.exceptions.GetTimeoutError):
                raise ClusterError(f"the shards did not prepare within {PREPARE_TIMEOUT_S:g} s") from error
            raise
        routers = self._routers()
        # However long it takes: a router that went over unnoticed would use slots that the next move writes to.
        ray.get([router.adopt.remote(table) for router in routers])
        self._placement = new
        self._members.go_over(new)
        _settle([actor.drop.remote(old.generation) for actor in actors])
        copied, seconds = sum(one.num_bytes for one in moved), sum(one.seconds for one in moved)
        if seconds > 0:
            self._bytes_per_s = copied / seconds
        took = round(time.monotonic() - start, 3)
        change = PlacementChange(time.time(), old.generation, new, reason, copied, took, gain)
        _settle([router.note_change.remote(change) for router in routers])
        return sum(one.probed for one in moved)

    def _numbered(self, steps: Sequence[Step]) -> list[Step]:
        numbered = []
        for step in steps:
            self._last_generation += 1
            numbered.append(replace(step, placement=replace(step.placement, generation=self._last_generation)))
        return numbered

    def _loads(self) -> Load:
        seen = ray.get([router.loads.remote(WINDOW_S) for router in self._routers()], timeout=CALL_TIMEOUT_S)
        return Load(
            counts=np.sum([one.counts for one in seen], axis=0),
            pairs=int(sum(one.pairs.sum() for one in seen)),
            compute_ns=int(sum(one.compute_ns.sum() for one in seen)),
            seconds=max(one.seconds for one in seen),
        )

    def _link_speed(self, placement: Placement, actors: Sequence[Any], endpoints: Sequence[Endpoint]) -> float:
        """Measured by reading one slot of the next shard."""
        if len(actors) < 2:
            return float("inf")
        slot = int(np.argmax(placement.slots[0, 0] != EMPTY))
        return ray.get(actors[1].link_speed.remote(0, slot, endpoints[0]), timeout=CALL_TIMEOUT_S)

    def _routers(self) -> list[Any]:
        names = [self._link.router_name(rank) for rank in range(self._link.num_routers)]
        return [ray.get_actor(name, namespace=NAMESPACE) for name in names]

    def _outcome(
        self,
        outcome: str,
        reason: str,
        planned: Plan | None = None,
        verdict: Payback | None = None,
        excess_before: float = 0.0,
    ) -> Outcome:
        found = Outcome(outcome, reason, time.time(), self._placement.generation, excess_before)
        if planned is not None:
            excess = float(np.mean(planned.imbalance.excess))
            found = replace(found, excess_after=excess, gap_to_bound=float(np.max(planned.gap)))
        if verdict is not None:
            found = replace(found, gain_s_per_s=verdict.gain, cost_s=verdict.cost_s, num_bytes=verdict.num_bytes)
        return found


@dataclass(frozen=True)
class Load:
    """What all routers saw. counts [L, E] (token, expert) pairs; pairs and compute_ns over all shards."""

    counts: np.ndarray
    pairs: int
    compute_ns: int
    seconds: float


def _num_transfers(steps: Sequence[Step]) -> int:
    return sum(len(step.transfers) for step in steps)


def _settle(references: list[Any]) -> None:
    """Waits for calls whose failure changes nothing: an actor that is gone has nothing to drop."""
    for reference in references:
        try:
            ray.get(reference, timeout=CALL_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            log.warning("%s", str(error).strip().splitlines()[0])

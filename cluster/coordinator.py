"""The coordinator actor: membership, placement, addresses, restarts. Never on the per-layer path.

waiting ─> starting ─> loading ─> up ─┐
              ^                       │ process ended, or the data plane gave it up
              └──────── restart <─────┘        (MAX_RESTARTS in a row without coming up: failed)
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ep.cluster.gpus import KEEP_VISIBLE
from ep.cluster.hosted import HostedShard
from ep.cluster.hosts import HostWatch, live_hosts
from ep.cluster.members import SERVING, CoordinatorSetup, Member, ShardState
from ep.cluster.rebalancer import Outcome, Rebalancer
from ep.cluster.shard_actor import ShardActor, ShardSetup
from ep.errors import ClusterError, ShardLostError, UserError
from ep.link import NAMESPACE
from ep.placement import Placement

if TYPE_CHECKING:
    from ep.transport.base import Endpoint

MAX_FAILURES = 3
_PING_TIMEOUT_S = 2.0
_BACKOFF_S, _MAX_BACKOFF_S = 0.1, 10.0
_LOOK_FOR_ROOM_S, _LOOK_AGAIN_S = 1.0, 0.25
_VERDICT_S = 5.0
"""In which a host that is lost is known to be (cluster/hosts.py)."""


class NoRoomError(ClusterError):
    """A shard's host is lost and no other has room for it, for now."""


class Coordinator:
    """Runs with many control threads: routers wait in `replacement` while a shard is restarted."""

    def __init__(self, setup: CoordinatorSetup, placement_group: Any) -> None:
        self._setup = setup
        self._group = placement_group
        self._changed = threading.Condition()
        self._shards = [ShardState(i, host) for i, host in enumerate(setup.hosts)]
        self._hosts = HostWatch(dict.fromkeys(setup.hosts), self._lose_host)
        self._phases: dict[int, str] = {}
        self._user_error: UserError | None = None
        self._closing = False
        self._placement = Placement.from_dict(setup.placement)
        self._coming: Placement | None = None
        self._started_at = time.time()
        self._hosts.start()
        for shard in self._shards[: setup.num_hosted]:
            shard.actor = HostedShard(setup.link.router_name(shard.shard_idx))
            shard.state, shard.incarnation = "loading", 1
        for shard in self._shards[setup.num_hosted :]:
            threading.Thread(
                target=self._keep_alive, args=(shard,), daemon=True, name=f"keep-{shard.shard_idx}"
            ).start()
        self._rebalancer = Rebalancer(setup.link, self._placement, self, setup.rebalance)

    def rebalance(self, force: bool) -> Outcome:
        """Plan from the load that was seen, and move if that pays back or is forced."""
        return self._rebalancer.rebalance(force)

    def set_auto_rebalance(self, auto: bool) -> None:
        self._rebalancer.set_auto(auto)

    def is_serving(self) -> bool:
        return self._all_up() and set(self._phases.values()) == {SERVING}

    def actors(self) -> list[Any]:
        with self._changed:
            late = [shard.shard_idx for shard in self._shards if shard.state != "up"]
            if late:
                raise ClusterError(f"shards {late} are not up")
            return [shard.actor for shard in self._shards]

    def endpoints(self) -> list[Endpoint]:
        with self._changed:
            return [self._member(shard).endpoint for shard in self._shards]

    def expect(self, placement: Placement | None) -> None:
        with self._changed:
            self._coming = placement

    def go_over(self, placement: Placement) -> None:
        with self._changed:
            self._placement, self._coming = placement, None

    def members(self, timeout_s: float) -> list[Member]:
        """All shards, once all are up. Raises the loading error of a shard, ClusterError after timeout_s."""
        with self._changed:
            self._changed.wait_for(lambda: self._user_error or self._failed() or self._all_up(), timeout_s)
            if self._user_error is not None:
                raise self._user_error
            if failed := self._failed():
                raise ClusterError(f"shard {failed.shard_idx} could not be started: {failed.error}")
            late = [s.shard_idx for s in self._shards if s.state != "up"]
            if late:
                raise ClusterError(f"shards {late} are not up after {timeout_s:g} s")
            return [self._member(shard) for shard in self._shards]

    def replacement(self, shard_idx: int, incarnation: int, reason: str, timeout_s: float) -> Member:
        """The shard's next incarnation, once it is up; `incarnation` is the one that a router lost.

        Raises ShardLostError where none comes up within timeout_s seconds.
        """
        shard = self._shards[shard_idx]
        if isinstance(shard.actor, HostedShard):
            raise ShardLostError(shard_idx, f"{reason}; it lives and ends with router {shard_idx}")
        self._give_up(shard, incarnation, reason)
        with self._changed:
            done = self._changed.wait_for(
                lambda: shard.state == "failed" or (shard.state == "up" and shard.incarnation > incarnation), timeout_s
            )
            if not done:
                raise ShardLostError(shard_idx, f"{reason}; not back within {timeout_s:g} s ({shard.state})")
            if shard.state == "failed":
                raise ShardLostError(shard_idx, f"{reason}; it cannot be restarted: {shard.error}")
            return self._member(shard)

    def hosted_up(self, shard_idx: int, endpoint: Endpoint) -> None:
        """A router says that the shard in its process has loaded."""
        shard = self._shards[shard_idx]
        with self._changed:
            shard.endpoint, shard.state = endpoint, "up"
            self._changed.notify_all()

    def set_phase(self, rank: int, phase: str) -> None:
        """A router says what it is doing, for the terminal."""
        self._phases[rank] = phase

    def progress(self) -> dict[str, Any]:
        """For the terminal while things start: state and experts loaded of every shard, phase of every router."""
        calls = {}
        for shard in self._shards:
            if shard.actor is not None:
                with suppress(ValueError):  # its router is not there yet
                    calls[shard.shard_idx] = shard.actor.progress.remote()
        loaded = _answers(calls)
        shards = [{"state": s.state, "experts": loaded.get(s.shard_idx, (0, 0))} for s in self._shards]
        return {"shards": shards, "routers": dict(self._phases)}

    def status(self) -> dict[str, Any]:
        """Everything that `ep status` prints of the shards and the instance."""
        calls = {s.shard_idx: s.actor.status.remote() for s in self._shards if s.state == "up"}
        live = _answers(calls)
        shards = [
            {
                "shard_idx": s.shard_idx,
                "host": s.host,
                "state": "no answer" if s.shard_idx in calls and s.shard_idx not in live else s.state,
                "incarnation": s.incarnation,
                "restart_seconds": s.restarts,
                "error": s.error,
            }
            | live.get(s.shard_idx, {})
            for s in self._shards
        ]
        return {
            "instance": self._setup.link.instance,
            "model": self._setup.model,
            "checkpoint": self._setup.checkpoint,
            "generation": self._placement.generation,
            "coming_generation": None if (coming := self._coming) is None else coming.generation,
            "num_routers": self._setup.link.num_routers,
            "uptime_s": time.time() - self._started_at,
            "routers": dict(self._phases),
            "hosts": self._hosts.status(),
            "shards": shards,
        } | self._rebalancer.status()

    def close(self) -> None:
        """End all shards and restart none."""
        self._closing = True
        for shard in self._shards:
            _end(shard.actor)

    def _keep_alive(self, shard: ShardState) -> None:
        """Start the shard and start it again whenever its process ends.

        A shard that never came up fails for good, at once if the user must mend something. One that was up is tried
        again as long as this instance lives: what it needs may come back.
        """
        failures, was_up = 0, False
        lost_at = time.monotonic()
        while not self._closing:
            try:
                self._start(shard)
            except Exception as error:  # a node can vanish at any point of a start, in any of Ray's ways
                failures += 1
                final = not was_up and (isinstance(error, UserError) or failures >= MAX_FAILURES)
                with self._changed:
                    shard.error = self._why(shard, str(error).strip().splitlines()[-1])
                    out = final or failures >= MAX_FAILURES or isinstance(error, NoRoomError)
                    shard.state = "failed" if out else "waiting"
                    if final and isinstance(error, UserError):
                        self._user_error = error
                    self._changed.notify_all()
                if final:
                    return
                backoff = min(_BACKOFF_S * 2**failures, _MAX_BACKOFF_S)
                time.sleep(_LOOK_FOR_ROOM_S if isinstance(error, NoRoomError) else backoff)
                continue
            if was_up:
                shard.restarts.append(round(time.monotonic() - lost_at, 3))
            failures, was_up = 0, True
            try:
                ray.get(shard.actor.watch.remote())
            except RayError as error:
                lost_at = time.monotonic()
                with self._changed:
                    shard.state, shard.endpoint = "starting", None
                    shard.error = self._why(shard, str(error).strip().splitlines()[0])
                    self._changed.notify_all()

    def _start(self, shard: ShardState) -> None:
        setup = self._setup
        incarnation = shard.incarnation + 1
        host, strategy = self._place(shard.shard_idx)
        options = {
            "name": setup.link.shard_name(shard.shard_idx, incarnation),
            "namespace": NAMESPACE,
            "num_cpus": setup.num_cpus,
            "num_gpus": setup.num_gpus,
            "runtime_env": {"env_vars": KEEP_VISIBLE} if setup.num_gpus else None,
            "max_restarts": 0,
            "max_concurrency": 4,
            "enable_task_events": False,
            "scheduling_strategy": strategy,
        }
        with self._changed:
            coming = None if self._coming is None else self._coming.to_dict()
            placement = self._placement.to_dict()
        actor = (
            ray.remote(ShardActor)
            .options(**options)
            .remote(
                ShardSetup(
                    checkpoint=setup.checkpoint,
                    placement=placement,
                    shard_idx=shard.shard_idx,
                    num_threads=setup.num_threads,
                    key=setup.key,
                    fp8=setup.fp8,
                    coming=coming,
                    ipc=setup.ipc if host == setup.link.node_ip else None,
                )
            )
        )
        with self._changed:
            shard.actor, shard.state, shard.incarnation, shard.host = actor, "loading", incarnation, host
        if why := self._hosts.lost(host):  # since it was chosen: `_lose_host` did not see this actor
            ray.kill(actor)
            raise ClusterError(f"host {host} is lost: {why}")
        try:
            ray.get(actor.load.remote())
            endpoint = ray.get(actor.listen.remote())
        except ray.exceptions.RayTaskError as error:
            ray.kill(actor)
            cause = getattr(error, "cause", None)
            raise cause if isinstance(cause, UserError) else error from None
        with self._changed:
            shard.endpoint, shard.state, shard.error = endpoint, "up", ""
            self._changed.notify_all()

    def _place(self, shard_idx: int) -> tuple[str, Any]:
        """Address and scheduling strategy: the shard's own bundle, or any host with room while that one's is lost.

        Raises NoRoomError.
        """
        home, last = self._setup.hosts[shard_idx], self._shards[shard_idx].host
        if not self._hosts.lost(home):
            bundle = shard_idx - self._setup.num_hosted
            return home, PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        needs = {"CPU": self._setup.num_cpus, "GPU": self._setup.num_gpus}
        verdict = time.monotonic() + _VERDICT_S
        while True:
            for host in live_hosts():
                if host.room(needs) and not self._hosts.lost(host.address):
                    self._hosts.watch(host.address)
                    return host.address, NodeAffinitySchedulingStrategy(host.node_id, soft=False)
            # Where it ran last is lost as well, or about to have the room again that it had there.
            if self._hosts.lost(last) or time.monotonic() > verdict:
                break
            time.sleep(_LOOK_AGAIN_S)
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in needs.items() if amount)
        lost = last if self._hosts.lost(last) else home
        why = self._hosts.lost(lost)
        raise NoRoomError(f"host {lost} is lost ({why}), and no other host has {wanted or 'room'} free")

    def _lose_host(self, address: str) -> None:
        """End the shards there: Ray may take a minute to see that they are out of reach."""
        with self._changed:
            there = [s for s in self._shards if s.host == address and s.state in ("up", "loading", "starting")]
            for shard in there:
                shard.state, shard.endpoint = "starting", None
                shard.error = self._why(shard, "")
        for shard in there:
            _end(shard.actor)

    def _why(self, shard: ShardState, said: str) -> str:
        """The loss of the shard's host, which says more than what Ray said of its actor."""
        lost = self._hosts.lost(shard.host)
        return f"host {shard.host} is lost: {lost}" if lost and "is lost" not in said else said

    def _give_up(self, shard: ShardState, incarnation: int, reason: str) -> None:
        """End an incarnation that a router cannot reach: a process that hangs is not noticed by Ray."""
        with self._changed:
            if shard.incarnation != incarnation or shard.state != "up":
                return
            actor = shard.actor
            shard.state, shard.endpoint, shard.error = "starting", None, reason
        ray.kill(actor)

    def _member(self, shard: ShardState) -> Member:
        assert shard.endpoint is not None
        return Member(shard.shard_idx, shard.incarnation, shard.endpoint, shard.actor)

    def _all_up(self) -> bool:
        return all(shard.state == "up" for shard in self._shards)

    def _failed(self) -> ShardState | None:
        return next((shard for shard in self._shards if shard.state == "failed"), None)


def _end(actor: Any) -> None:
    """The process of a shard, if it has one of its own."""
    if actor is not None and not isinstance(actor, HostedShard):
        ray.kill(actor)


def _answers(calls: dict[int, Any]) -> dict[int, Any]:
    """What comes back of these calls in time."""
    ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=_PING_TIMEOUT_S) if calls else ([], [])
    found = {}
    for idx, ref in calls.items():
        with suppress(RayError):
            if ref in ready:
                found[idx] = ray.get(ref)
    return found

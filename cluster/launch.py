"""Start and end everything that `ep serve` runs on a Ray cluster: placement group, coordinator, shards, routers."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ep.cluster.coordinator import Coordinator
from ep.cluster.gpus import KEEP_VISIBLE
from ep.cluster.hosts import live_hosts
from ep.cluster.members import CoordinatorSetup
from ep.cluster.rebalancer import RebalanceOptions
from ep.cluster.router_actor import RouterActor, RouterSetup, end_routers
from ep.cluster.session import Session
from ep.cluster.shard_actor import ShardSetup
from ep.cluster.spread import spread
from ep.errors import ClusterError
from ep.ipc_options import IpcOptions, block_name
from ep.link import NAMESPACE, Link
from ep.placement import Placement

_POLL_S = 0.25
_RESERVE_S = 5.0
_PIN = 0.001
"""Of a node's own resource: Ray gives every node 1 of `node:ADDRESS`."""
_METRICS_S = 10.0
_SAY_AFTER_S, _SAY_EVERY_S = 2.0, 10.0


@dataclass(frozen=True)
class LaunchOptions:
    """shard_cpus, shard_gpus: what each shard takes of its node. num_hosts: that the shards are spread over, None for
    all that have room. wait_s: how long to wait for these resources.

    num_routers: router actors, the tensor-parallel ranks of every engine. num_hosted: shards, the first ones, that live
    in the processes of as many routers (ipc only). trace: path on the routers' node that load is recorded in, None to
    record nothing.
    """

    instance: str
    model: str
    checkpoint: str
    placement: Placement
    transport: str = "socket"
    dispatch_dtype: str = "bf16"
    combine_dtype: str = "f32"
    fp8: bool | None = None
    deadline_s: float = 60.0
    start_timeout_s: float = 1800.0
    wait_s: float = 60.0
    shard_threads: int = 1
    shard_cpus: float = 1.0
    shard_gpus: float = 0.0
    num_hosts: int | None = None
    num_routers: int = 1
    num_hosted: int = 0
    router_threads: int = 1
    on_gpu: bool = False
    router_gpus: float = 0.0
    router_environment: dict[str, str] = field(default_factory=dict)
    rebalance: RebalanceOptions = field(default_factory=RebalanceOptions)
    trace: str | None = None
    trace_window_s: float = 10.0

    @property
    def num_shard_actors(self) -> int:
        """With the local transport the shards are objects in the router's process."""
        return 0 if self.transport == "local" else self.placement.num_shards - self.num_hosted

    @property
    def ipc(self) -> IpcOptions | None:
        """None where routers do not use it."""
        if self.transport != "ipc":
            return None
        return IpcOptions(block_name(self.instance), self.num_routers, self.dispatch_dtype, self.combine_dtype)


class Launch:
    """One running instance; `close` ends its actors and leaves the Ray cluster as it was."""

    def __init__(self, session: Session, options: LaunchOptions) -> None:
        self.session = session
        self.options = options
        self.link = Link(session.address, session.node_ip, options.instance, options.num_routers)
        self._key = secrets.token_bytes(32)
        self._group: PlacementGroup | None = None
        self._coordinator: Any = None
        self._routers: list[Any] = []
        self._hosts: list[str] = []

    def start(self, on_wait: Callable[[str], None]) -> None:
        """Reserve the shards' resources, then start coordinator, shards and routers; returns before they have loaded.

        on_wait is told what is missing while resources are waited for. Raises ClusterError when they do not come.
        """
        options = self.options
        hosts = self._hosts = [self.session.node_ip] * options.num_hosted
        if options.num_shard_actors:
            bundle = {"CPU": options.shard_cpus} | ({"GPU": options.shard_gpus} if options.shard_gpus else {})
            hosts += self._reserve(bundle, on_wait)
        here = NodeAffinitySchedulingStrategy(self.session.node_id, soft=False)
        self._coordinator = (
            ray.remote(Coordinator)
            .options(
                name=self.link.coordinator_name(),
                namespace=NAMESPACE,
                num_cpus=0,
                max_concurrency=64,
                enable_task_events=False,  # of control calls that never end: the head would keep 100,000 of them
                scheduling_strategy=here,
            )
            .remote(
                CoordinatorSetup(
                    link=self.link,
                    model=options.model,
                    checkpoint=options.checkpoint,
                    placement=options.placement.to_dict(),
                    hosts=tuple(hosts),
                    num_threads=options.shard_threads,
                    num_cpus=options.shard_cpus,
                    num_gpus=options.shard_gpus,
                    key=self._key,
                    fp8=options.fp8,
                    rebalance=options.rebalance,
                    num_hosted=options.num_hosted,
                    ipc=options.ipc,
                ),
                self._group,
            )
        )
        self._routers = [self._start_router(rank, here) for rank in range(options.num_routers)]

    @property
    def needs_host(self) -> bool:
        """Whether the routers' host has a part in every layer: where they reach some shard over sockets."""
        is_far = any(host != self.session.node_ip for host in self._hosts)
        return self.options.transport == "socket" or (self.options.transport == "ipc" and is_far)

    def progress(self) -> dict[str, Any]:
        """Coordinator.progress, or nothing while the coordinator itself starts or where it has ended."""
        try:
            return ray.get(self._coordinator.progress.remote(), timeout=5.0)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
            return {"shards": [], "routers": {}}

    def metrics(self) -> dict[str, Any]:
        """What ep/metrics.py shows: the coordinator's status and all routers' metrics, or none: a sum that lacks a
        router would look like counters that go back.

        Raises RayError where the coordinator does not answer.
        """
        calls = [router.metrics.remote() for router in self._routers]
        routers: list[dict[str, Any] | None] = []
        with suppress(ray.exceptions.RayError):
            routers = ray.get(calls, timeout=_METRICS_S)
        status = ray.get(self._coordinator.status.remote(), timeout=_METRICS_S)
        return {"coordinator": status, "routers": [] if None in routers else routers}

    def set_phase(self, phase: str) -> None:
        """What `ep status` says of the routers from now on."""
        for rank in range(self.options.num_routers):
            self._coordinator.set_phase.remote(rank, phase)

    def has_failed_shard(self) -> bool:
        return any(shard["state"] == "failed" for shard in self.progress()["shards"])

    def wait_for_shards(self) -> None:
        """Raises what kept a shard from loading: CheckpointError, ClusterError."""
        try:
            ray.get(self._coordinator.members.remote(self.options.start_timeout_s))
        except ray.exceptions.RayTaskError as error:
            raise getattr(error, "cause", error) from None
        except ray.exceptions.RayActorError as error:
            raise ClusterError(f"the coordinator ended while it started: {error}") from None

    def close(self) -> None:
        """End the routers, the shards and the coordinator; give their resources back."""
        end_routers(self._routers)
        if self._coordinator is not None:
            with suppress(ray.exceptions.RayError):
                ray.get(self._coordinator.close.remote(), timeout=5.0)
            ray.kill(self._coordinator)
        if self._group is not None:
            remove_placement_group(self._group)
        self._routers, self._coordinator, self._group = [], None, None

    def _start_router(self, rank: int, here: NodeAffinitySchedulingStrategy) -> Any:
        options = self.options
        placement = options.placement.to_dict()
        hosted = None
        if rank < options.num_hosted:
            hosted = ShardSetup(
                options.checkpoint, placement, rank, options.shard_threads, self._key, options.fp8, ipc=options.ipc
            )
        setup = RouterSetup(
            link=self.link,
            rank=rank,
            model=options.model,
            checkpoint=options.checkpoint,
            placement=placement,
            transport=options.transport,
            hosts=tuple(self._hosts),
            on_gpu=options.on_gpu,
            dispatch_dtype=options.dispatch_dtype,
            combine_dtype=options.combine_dtype,
            ipc=options.ipc,
            hosted=hosted,
            deadline_s=options.deadline_s,
            start_timeout_s=options.start_timeout_s,
            num_threads=options.router_threads,
            key=self._key,
            fp8=options.fp8,
            environment=options.router_environment,
            trace=options.trace,
            trace_window_s=options.trace_window_s,
        )
        return (
            ray.remote(RouterActor)
            .options(
                name=self.link.router_name(rank),
                namespace=NAMESPACE,
                num_cpus=0,
                num_gpus=options.router_gpus,
                runtime_env={"env_vars": KEEP_VISIBLE} if options.router_gpus else None,
                max_concurrency=8,
                enable_task_events=False,
                scheduling_strategy=here,
            )
            .remote(setup)
        )

    def _reserve(self, bundle: dict[str, float], on_wait: Callable[[str], None]) -> list[str]:
        """The host of each shard, its resources reserved there. Raises ClusterError when they do not come."""
        deadline = time.monotonic() + self.options.wait_s
        quiet_until = time.monotonic() + _SAY_AFTER_S
        while True:
            options = self.options
            first, *others = live_hosts(self.session.node_id)
            first = first.without({"GPU": options.router_gpus * options.num_routers})
            hosts = spread([first, *others], bundle, options.num_shard_actors, options.num_hosts)
            if hosts is not None:
                # Each bundle keeps to its host: on another one's loss Ray would move it to wherever there is room.
                self._group = placement_group([bundle | {f"node:{host}": _PIN} for host in hosts])
                if self._group.wait(_RESERVE_S):
                    return hosts
                remove_placement_group(self._group)  # somebody else was faster
                self._group = None
            missing = self._missing(bundle)
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{missing}; gave up after {self.options.wait_s:g} s: add nodes, or lower --shards or --shard-cpus"
                )
            if time.monotonic() > quiet_until:
                on_wait(missing)
                quiet_until = time.monotonic() + _SAY_EVERY_S
            time.sleep(_POLL_S)

    def _missing(self, bundle: dict[str, float]) -> str:
        options = self.options
        num_shards, gpus = options.num_shard_actors, options.router_gpus * options.num_routers
        free, alive = ray.available_resources(), sum(node["Alive"] for node in ray.nodes())
        asked = ", ".join(f"{num_shards} x {amount:g} {name}" for name, amount in bundle.items())
        if options.num_hosts is not None:
            asked += f" on {options.num_hosts} nodes"
        if gpus:
            asked += f", routers {gpus:g} GPU on this one"
        have = ", ".join(f"{free.get(name, 0):g} {name}" for name in bundle)
        return f"{num_shards} shards need {asked}; free on {alive} node{'s' * (alive != 1)}: {have}"

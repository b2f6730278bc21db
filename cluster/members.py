"""What the coordinator is made from, and what it knows of every shard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ep.cluster.rebalancer import RebalanceOptions
from ep.link import Link

if TYPE_CHECKING:
    from ep.ipc_options import IpcOptions
    from ep.transport.base import Endpoint


SERVING = "serving"
"""The phase of a router once the server answers."""


@dataclass(frozen=True)
class CoordinatorSetup:
    """hosts: the address of each shard's host, a bundle of the placement group for each but the first num_hosted ones,
    which live in the processes of the routers with the same index. num_cpus, num_gpus: what each shard takes from its
    bundle. ipc: for routers on a shard's host."""

    link: Link
    model: str
    checkpoint: str
    placement: dict[str, Any]
    hosts: tuple[str, ...]
    num_threads: int
    num_cpus: float
    num_gpus: float
    key: bytes
    fp8: bool | None
    rebalance: RebalanceOptions
    num_hosted: int = 0
    ipc: IpcOptions | None = None


@dataclass(frozen=True)
class Member:
    """A shard that can be reached: its incarnation counts its starts. actor: takes a ShardActor's calls."""

    shard_idx: int
    incarnation: int
    endpoint: Endpoint
    actor: Any


@dataclass
class ShardState:
    """A shard as the coordinator knows it. state: waiting, starting, loading, up or failed, and the error that made it
    so. restarts: seconds that each took."""

    shard_idx: int
    host: str
    incarnation: int = 0
    state: str = "waiting"
    actor: Any = None
    endpoint: Endpoint | None = None
    error: str = ""
    restarts: list[float] = field(default_factory=list)

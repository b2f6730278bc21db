"""The Ray actor around a Shard: loads it, lets it listen, answers control calls. Requests never pass through Ray."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ep.cluster.gpus import claim
from ep.cluster.session import restore_priority

if TYPE_CHECKING:
    from ep.ipc_options import IpcOptions
    from ep.migration import Transfer
    from ep.mover import Moved
    from ep.transport.base import Endpoint
    from ep.transport.ipc_handles import RouterHandles, ShardHandles

SWITCH_S = 5e-4
"""How long a control call may keep the interpreter from the thread that serves."""


@dataclass(frozen=True)
class ShardSetup:
    """What a shard is made from. placement: Placement.to_dict(); key: the cluster's random key; fp8: whether an FP8
    checkpoint's experts stay so, None for the device's default; coming: a placement that routers may go over to while
    this shard starts; ipc: for the routers of its node, None where all of them use sockets."""

    checkpoint: str
    placement: dict[str, Any]
    shard_idx: int
    num_threads: int
    key: bytes
    fp8: bool | None = None
    coming: dict[str, Any] | None = None
    ipc: IpcOptions | None = None


class ShardActor:
    """One shard, with several control threads beside its own that computes. own_process: it may set up the process."""

    def __init__(self, setup: ShardSetup, own_process: bool = True) -> None:
        self._setup = setup
        self._shard: Any = None
        self._ipc: Any = None
        self._mover: Any = None
        self._progress = (0, 0)
        self._own_process = own_process
        if own_process:
            # Read by OpenMP when torch is imported, which is why torch is imported below.
            os.environ["OMP_NUM_THREADS"] = str(setup.num_threads)
            restore_priority()
            claim()
            sys.setswitchinterval(SWITCH_S)

    def load(self) -> None:
        """Read this shard's slots from the checkpoint. Raises CheckpointError."""
        from ep.checkpoint import Checkpoint
        from ep.placement import Placement
        from ep.shard import Shard

        coming = self._setup.coming
        self._shard = Shard.load(
            Checkpoint(self._setup.checkpoint),
            Placement.from_dict(self._setup.placement),
            self._setup.shard_idx,
            on_progress=self._note_progress,
            fp8=self._setup.fp8,
            coming=None if coming is None else Placement.from_dict(coming),
        )

    def listen(self) -> Endpoint:
        """Open the data plane on this node, for ipc too if so asked; returns where routers connect by sockets."""
        import ray

        from ep.checkpoint import Checkpoint
        from ep.compute.choose import choose_device
        from ep.mover import Mover

        if self._setup.ipc is not None:
            from ep.ipc_shard import IpcShard

            self._ipc = IpcShard(
                self._shard, self._setup.ipc, choose_device(), _end_process, is_hosted=not self._own_process
            )
        node_id = ray.get_runtime_context().get_node_id()
        self._mover = Mover(self._shard, Checkpoint(self._setup.checkpoint), self._setup.key, node_id)
        return self._shard.listen(
            self._setup.key,
            node_id=node_id,
            host=ray.util.get_node_ip_address(),
            num_threads=self._setup.num_threads,
        )

    def attach(self, handles: RouterHandles) -> ShardHandles:
        """From now on this router of the node is served over ipc. Raises TransportError, RuntimeError."""
        return self._ipc.attach(handles)

    def launching_s(self) -> float:
        """For how long the ipc side has been at a launch (IpcShard.launching_s)."""
        return self._ipc.launching_s()

    def prepare(self, placement: dict[str, Any], transfers: list[Transfer], endpoints: list[Endpoint]) -> Moved:
        """Take in new experts beside the old ones, try them, and answer requests of that placement too.

        Raises ShardLostError, ShardFailedError, ClusterError: the placement is then not served.
        """
        from ep.placement import Placement

        moved = self._mover.prepare(Placement.from_dict(placement), transfers, endpoints)
        self._refresh()
        return moved

    def drop(self, generation: int) -> None:
        """Answer no more requests of this generation."""
        self._shard.drop(generation)
        self._refresh()

    def slot_bytes(self) -> int:
        """Of one slot in one layer."""
        from ep.compute import slot_memory

        return slot_memory.num_bytes(self._shard.slot_parts(0, 0))

    def link_speed(self, layer_pos: int, slot_idx: int, endpoint: Endpoint) -> float:
        """Bytes per second of reading a peer's slot."""
        return self._mover.link_speed(layer_pos, slot_idx, endpoint)

    def progress(self) -> tuple[int, int]:
        """(experts loaded, experts to load)."""
        return self._progress

    def watch(self) -> None:
        """Never returns: its end tells the coordinator that this process has ended."""
        threading.Event().wait()

    def status(self) -> dict[str, Any]:
        import ray

        node = {"node_id": ray.get_runtime_context().get_node_id(), "node_ip": ray.util.get_node_ip_address()}
        found = node | {"pid": os.getpid()}
        if self._shard is not None:
            found |= self._shard.status()
        if self._ipc is not None:
            for name, value in self._ipc.status().items():
                found[name] = found.get(name, 0) + value
        return found

    def _refresh(self) -> None:
        """The ipc side serves what the shard does."""
        if self._ipc is not None:
            self._ipc.refresh()

    def _note_progress(self, done: int, total: int) -> None:
        self._progress = (done, total)


def _end_process() -> None:
    """For who watches it to start another: a shard that cannot serve any more is worse than none."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)

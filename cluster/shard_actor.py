"""The Ray actor around a Shard: loads it, lets it listen, answers control calls. Requests never pass through Ray."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ep.cluster.session import restore_priority

if TYPE_CHECKING:
    from ep.transport.base import Endpoint


@dataclass(frozen=True)
class ShardSetup:
    """What a shard is made from. placement: Placement.to_dict(); key: the cluster's random key."""

    checkpoint: str
    placement: dict[str, Any]
    shard_idx: int
    num_threads: int
    key: bytes


class ShardActor:
    """One shard's process. Runs with several control threads; the shard's own thread computes."""

    def __init__(self, setup: ShardSetup) -> None:
        # Read by OpenMP when torch is imported, which is why torch is imported below.
        os.environ["OMP_NUM_THREADS"] = str(setup.num_threads)
        restore_priority()
        self._setup = setup
        self._shard: Any = None
        self._progress = (0, 0)

    def load(self) -> None:
        """Read this shard's slots from the checkpoint. Raises CheckpointError."""
        from ep.checkpoint import Checkpoint
        from ep.placement import Placement
        from ep.shard import Shard

        self._shard = Shard.load(
            Checkpoint(self._setup.checkpoint),
            Placement.from_dict(self._setup.placement),
            self._setup.shard_idx,
            on_progress=self._note_progress,
        )

    def listen(self) -> Endpoint:
        """Open the data plane's sockets on this node; returns where routers connect."""
        import ray

        return self._shard.listen(
            self._setup.key,
            node_id=ray.get_runtime_context().get_node_id(),
            host=ray.util.get_node_ip_address(),
            num_threads=self._setup.num_threads,
        )

    def progress(self) -> tuple[int, int]:
        """(experts loaded, experts to load)."""
        return self._progress

    def watch(self) -> None:
        """Never returns: its end tells the coordinator that this process has ended."""
        threading.Event().wait()

    def status(self) -> dict[str, Any]:
        import ray

        node = {"node_id": ray.get_runtime_context().get_node_id(), "node_ip": ray.util.get_node_ip_address()}
        return node | {"pid": os.getpid()} | (self._shard.status() if self._shard is not None else {})

    def _note_progress(self, done: int, total: int) -> None:
        self._progress = (done, total)

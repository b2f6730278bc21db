"""The recorder of a router actor and its trace file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from ep.engine.phases import token_phases
from ep.load import PlacementChange
from ep.planning.plan import shard_load
from ep.recorder import LoadRecorder, RecentLoad
from ep.trace_header import TraceHeader
from ep.trace_log import TraceLog
from ep.trace_parts import part_path

if TYPE_CHECKING:
    from ep.cluster.router_actor import RouterSetup
    from ep.model import ModelSpec
    from ep.placement import Placement


@dataclass(frozen=True)
class Recording:
    """A router's load: counted by the recorder, written by the log into this router's part of the trace."""

    recorder: LoadRecorder
    log: TraceLog
    spec: ModelSpec

    @classmethod
    def start(
        cls,
        setup: RouterSetup,
        spec: ModelSpec,
        placement: Placement,
        versions: Mapping[str, str],
    ) -> Recording | None:
        """None where `ep serve` was told to record nothing.

        Raises TraceError for a path that exists or cannot be written.
        """
        if setup.trace is None:
            return None
        here = ray.util.get_node_ip_address()
        nodes = list(setup.hosts) or [here] * placement.num_shards
        routers = [here] * setup.link.num_routers  # `Launch` puts them all on one node
        header = TraceHeader.now(setup.model, spec, placement, nodes, routers, versions)
        path = part_path(setup.trace, setup.rank)
        recorder = LoadRecorder(
            spec, placement.num_shards, setup.rank, setup.trace_window_s, token_phases=token_phases
        )
        return cls(recorder, TraceLog(path, header, recorder), spec)

    def trace_bytes(self) -> bytes:
        """The trace's file, what is counted until now included."""
        return self.log.read()

    def loads(self, seconds: float) -> RecentLoad:
        return self.recorder.totals_since(seconds)

    def note_change(self, change: PlacementChange) -> None:
        """Behind the windows of the generation that it ends."""
        self.recorder.flush()
        self.log.put(change)

    def status(self) -> dict[str, Any]:
        """For `ep status`: where the trace is, all that is counted in it, and what keeps it from growing."""
        self.recorder.flush()
        return {"trace": str(self.log.path), "trace_error": self.log.error}

    def last_window(self, placement: Placement) -> dict[str, Any] | None:
        """Of the last closed window of this placement: pairs of each shard, [L, S], by phase; layers: their numbers in
        the checkpoint. None until there is one."""
        windows = [window for window in self.recorder.recent() if window.generation == placement.generation]
        if not windows:
            return None
        window = windows[-1]
        return {
            "layers": list(self.spec.moe_layers),
            "prefill": shard_load(placement, window.prefill).tolist(),
            "decode": shard_load(placement, window.decode).tolist(),
        }

    def close(self) -> None:
        """Write what is counted until now."""
        self.log.close()

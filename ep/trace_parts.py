"""The trace of an instance with several routers: each writes a part of its own, and a reader puts them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ep.errors import TraceError
from ep.trace import Trace, read_trace


def part_path(path: str | Path, rank: int) -> str:
    """Where router `rank` writes, `path` being the trace's: there itself, or behind its name and the rank."""
    return str(path) if rank == 0 else f"{path}.{rank}"


def read_all_parts(path: str | Path) -> Trace:
    """The load of all routers of the trace at `path`.

    Raises TraceError as `read_trace` does, for any part, and where a part is another instance's.
    """
    first = read_trace(path)
    num_routers = len(first.header.node_of_router)
    return merge_parts([first, *(read_trace(part_path(path, rank)) for rank in range(1, num_routers))])


def merge_parts(parts: Sequence[Trace]) -> Trace:
    """One trace of all routers' windows in the order of their start, changes of placement once. Raises TraceError."""
    first = parts[0]
    header = first.header
    for rank, part in enumerate(parts):
        same = (part.header.model, part.header.spec, part.header.node_of_shard, part.header.node_of_router)
        if same != (header.model, header.spec, header.node_of_shard, header.node_of_router):
            raise TraceError(f"{part.source}: is of another instance than {first.source}, expected its router {rank}")
        strangers = {window.router for window in part.windows} - {rank}
        if strangers:
            raise TraceError(f"{part.source}: has windows of router {min(strangers)}, expected router {rank} only")
    windows = sorted((w for part in parts for w in part.windows), key=lambda window: (window.start, window.router))
    changes = {change.new_generation: change for part in reversed(parts) for change in part.changes}
    return replace(
        first,
        windows=tuple(windows),
        changes=tuple(sorted(changes.values(), key=lambda change: change.new_generation)),
        warnings=tuple(warning for part in parts for warning in part.warnings),
    )

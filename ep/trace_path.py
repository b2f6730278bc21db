"""Where `ep serve` records load."""

from __future__ import annotations

import os
from pathlib import Path

from ep.errors import TraceError
from ep.terminal import state_dir
from ep.trace_parts import part_path

NONE = "none"


def check_trace(option: str | None, num_routers: int) -> None:
    """Before anything starts: raises TraceError where a path is given that no new file of a router can have."""
    if option in (None, NONE):
        return
    path = Path(str(option)).absolute()
    for part in (part_path(str(option), rank) for rank in range(num_routers)):
        if os.path.lexists(part):
            raise TraceError(f"--trace {option}: {part} exists already, expected a path for a new trace")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)):
        raise TraceError(f"--trace {option}: {path.parent} is no folder that can be written")


def trace_path(option: str | None, instance: str) -> Path | None:
    """Absolute: the option's path, by default a new file in the state folder; None where nothing is recorded."""
    if option == NONE:
        return None
    if option is not None:
        return Path(option).absolute()
    folder = state_dir() / "traces"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{instance}.trace"

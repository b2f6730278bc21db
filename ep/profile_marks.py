"""What a torch profile of a router says beyond the times of its ops: how much of a wait was the shards' computing.

A profile has no event of another process, so the number travels in the name of an event without a length of its own.
"""

from __future__ import annotations

import torch

EXPERTS = "ep::experts "
"""How the mark's name starts; nanoseconds follow."""


def mark_experts(nanoseconds: int) -> None:
    """Says in the running profile, if there is one, how long the router waited for a shard that computed."""
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function(f"{EXPERTS}{nanoseconds}"):
            pass

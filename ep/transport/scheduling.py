"""How the kernel schedules a thread that answers requests."""

from __future__ import annotations

import contextlib
import os


def let_waker_run_on() -> None:
    """Waking this thread no longer preempts the thread that woke it (Linux: SCHED_BATCH, see sched(7)); else a no-op.

    A router rings one shard after the other. Where cores are few, the first shard would otherwise take the router's
    core at once and compute before the second has been told.
    """
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

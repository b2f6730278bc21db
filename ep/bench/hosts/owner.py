"""Whose a namespace or folder is: names carry the pid of their process and its start, so that leftovers are known."""

from __future__ import annotations

import os
import re

import psutil

PREFIX = "ep-hosts-"
_NAME = re.compile(rf"{PREFIX}(\d+)-(\d+)(?:-.*)?")


def own_name() -> str:
    """The start of every name that this process gives."""
    return f"{PREFIX}{os.getpid()}-{_started(os.getpid())}"


def is_left_over(name: str) -> bool:
    """Whether the process that gave this name is gone. False for names that no process of ours gave."""
    match = _NAME.fullmatch(name)
    return match is not None and _started(int(match.group(1))) != int(match.group(2))


def _started(pid: int) -> int:
    """Hundredths of a second since 1970, 0 where there is no such process."""
    try:
        return round(psutil.Process(pid).create_time() * 100)
    except psutil.NoSuchProcess:
        return 0

"""What an ipc server has done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class IpcStats:
    """Counted since the server was made. jobs: that found messages; messages: answered; joined: parts of jobs that had
    several; tokens: rows. launches: of jobs, those that found nothing among them, and launch_ns: what they took."""

    jobs: int = 0
    messages: int = 0
    joined: int = 0
    tokens: int = 0
    refused: int = 0
    launches: int = 0
    launch_ns: int = 0

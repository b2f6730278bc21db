"""Whether another process of this node still runs, noticed at once and without its help."""

from __future__ import annotations

import contextlib
import os
import select


class ProcessSentinel:
    """Of a process that ran when this was made; for any threads. Never blocks; says nothing where the kernel has no
    pidfd (Linux 5.3) or the process is in another pid namespace."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._file = -1
        with contextlib.suppress(OSError):
            self._file = os.pidfd_open(pid)

    def has_ended(self) -> bool:
        if self._file < 0:
            return False
        poll = select.poll()  # one poll object is for one thread at a time
        poll.register(self._file, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

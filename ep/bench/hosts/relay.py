"""A link that delays and loses frames where the kernel has no netem: `python -m ep.bench.hosts.relay --help`. Root.

Makes a TAP device in each of two network namespaces and carries frames between them in this process, until it is
terminated or its standard input ends. Prints "ready" once both devices are there.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import random
import select
import struct
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_FRAME_BYTES = 65_536
_MAX_QUEUED = 10_000
_AT_ONCE = 64


@dataclass
class _Direction:
    """Frames that wait until they are due, oldest first."""

    source: int
    sink: int
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)

    def take_in(self, delay_s: float, loss: float, rng: random.Random) -> None:
        """Reads what is there; a full queue drops, as a switch would."""
        for _ in range(_AT_ONCE):
            try:
                frame = os.read(self.source, _FRAME_BYTES)
            except OSError:  # nothing more, or the device is down
                return
            if len(self.waiting) < _MAX_QUEUED and rng.random() >= loss:
                self.waiting.append((time.monotonic() + delay_s, frame))

    def let_out(self) -> float | None:
        """Writes what is due; returns when the next frame will be."""
        while self.waiting and self.waiting[0][0] <= time.monotonic():
            with contextlib.suppress(OSError):  # a device that is down, or full: the frame is lost
                os.write(self.sink, self.waiting.popleft()[1])
        return self.waiting[0][0] if self.waiting else None


def open_tap(namespace: str, device: str) -> int:
    """A new TAP device in a named network namespace; it exists until the descriptor is closed."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(path: Path) -> None:
        target = os.open(path, os.O_RDONLY)
        try:
            if libc.setns(target, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {path}")
        finally:
            os.close(target)

    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        enter(Path("/run/netns") / namespace)
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TAP | _IFF_NO_PI))
        return tap
    finally:
        enter(Path(f"/proc/self/fd/{home}"))
        os.close(home)


def carry(one: int, other: int, delay_s: float, loss: float, rng: random.Random, end: int) -> None:
    """Between two descriptors, both ways, until `end` is readable."""
    directions = {one: _Direction(one, other), other: _Direction(other, one)}
    while True:
        due = [when for direction in directions.values() if (when := direction.let_out()) is not None]
        timeout = max(0.0, min(due) - time.monotonic()) if due else None
        ready, _, _ = select.select([one, other, end], [], [], timeout)
        if end in ready:
            return
        for fd in ready:
            directions[fd].take_in(delay_s, loss, rng)


def main() -> None:
    parser = argparse.ArgumentParser(prog="ep.bench.hosts.relay")
    parser.add_argument("--ends", nargs=2, required=True, metavar="NAMESPACE:DEVICE")
    parser.add_argument("--delay-ms", type=float, required=True)
    parser.add_argument("--loss", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    one, other = (open_tap(*end.rsplit(":", 1)) for end in given.ends)
    print("ready", flush=True)
    carry(one, other, given.delay_ms / 1e3, given.loss, random.Random(given.seed), 0)


if __name__ == "__main__":
    main()

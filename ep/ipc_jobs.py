"""What a shard's GPU is to do next: which waiting messages make one job, and the ring that tells it of jobs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ep.kernels import p2p_layout as layout
from ep.kernels.p2p_layout import Header
from ep.transport.ipc_device import IpcDevice

SIZE = 64
"""Jobs in the ring."""
DEPTH = 2
"""Jobs on the device at a time: one that runs, and one so that it does not idle between two. What comes meanwhile can
still join."""
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Waiting:
    """A router's message, or what is left of it from row `first` on."""

    router_idx: int
    header: Header
    first: int = 0

    @property
    def num_rows(self) -> int:
        return self.header.num_tokens - self.first


@dataclass(frozen=True)
class Part:
    """Rows of a message in a job. is_last: the message is answered with this job."""

    router_idx: int
    first: int
    num_rows: int
    seq: int
    is_last: bool


@dataclass(frozen=True)
class Joined:
    """One job: parts of one layer, num_rows in all. left: what still waits, in order."""

    layer_pos: int
    parts: list[Part]
    num_rows: int
    left: deque[Waiting]


def join(waiting: Iterable[Waiting], job_tokens: int) -> Joined:
    """The message that came first, with all that waits for its layer, as far as a job has room. Not for none."""
    parts: list[Part] = []
    left: deque[Waiting] = deque()
    layer_pos, rows = -1, 0
    for one in waiting:
        header, count = one.header, min(one.num_rows, job_tokens - rows)
        if not parts:
            layer_pos = header.layer_pos
        if header.layer_pos != layer_pos or not count or len(parts) == layout.MAX_JOINED:
            left.append(one)
            continue
        is_last = count == one.num_rows
        parts.append(Part(one.router_idx, one.first, count, header.seq, is_last))
        rows += count
        if not is_last:
            left.append(Waiting(one.router_idx, header, one.first + count))
    return Joined(layer_pos, parts, rows, left)


def bucket(num_rows: int) -> int:
    """The captured capacity for so many rows: 1, 2, 4, then multiples of 8."""
    return next((size for size in (1, 2, 4) if num_rows <= size), -(-num_rows // 8) * 8)


class JobRing:
    """Jobs in host memory, each to be followed by the launch that takes it; `collect` on the device reads them in
    order. For one thread."""

    size = SIZE

    def __init__(self, device: IpcDevice) -> None:
        self._jobs, self._done = device.host_words(SIZE * layout.JOB_WORDS), device.host_words(1)
        self.address, self.done_address = self._jobs.data_ptr(), self._done.data_ptr()
        # Single words are written and read several times as fast as through numpy.
        self._words, self._done_word = (memoryview(words.numpy().data) for words in (self._jobs, self._done))
        self._posted = 0

    @property
    def has_room(self) -> bool:
        return (self._posted - self._done_word[0]) & _MASK < DEPTH

    def post(self, layer_pos: int, num_rows: int, parts: list[Part]) -> None:
        words, joined = self._words, layout.MAX_JOINED
        start = (self._posted % SIZE) * layout.JOB_WORDS
        words[start + layout.JOB_LAYER] = layer_pos
        words[start + layout.JOB_TOKENS] = num_rows
        at, end = start + layout.JOB_ROUTERS, start + layout.JOB_ROUTERS + joined
        for part in parts:
            words[at] = part.router_idx
            words[at + joined] = part.first
            words[at + 2 * joined] = part.num_rows
            words[at + 3 * joined] = part.seq
            words[at + 4 * joined] = part.is_last
            at += 1
        while at < end:
            words[at], words[at + 2 * joined], words[at + 4 * joined] = -1, 0, 0
            at += 1
        self._posted = (self._posted + 1) & _MASK

"""One block of shared memory per node, in which all routers and shards of an instance signal each other.

    preamble             magic, numbers of routers and shards
    headers   [N, S]     the newest message of a router to a shard; written by the router's GPU, polled by the shard
    refusals  [N, S]     which message a shard refused last, and why, and which it has launched an answer to; written by
                         the shard
    routers   [N]        abort, waiting, failed, ... of each router, written by its GPU and its host; its generation

The block is a file in /dev/shm without an owner: whoever comes first makes it, everybody holds a shared lock while
attached, and the last one to leave unlinks it. The kernel drops the locks of processes that die, so a block that nobody
holds is a leftover: the next one who opens any block removes it.

Shape legend: N routers, S shards.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ep.errors import OptionError, TransportError
from ep.kernels.p2p_layout import BEGUN, LINE, router_words

FOLDER = Path("/dev/shm")
PREFIX = "ep-mailbox-"
MAGIC = 0x6D61696C_65702E31
ATTACH_S = 2.0
"""How long a block may take from being made to being filled in."""

OUT_OF_GENERATION, OUT_OF_RANGE, BROKEN = 1, 2, 3
"""Why a shard refuses a message: its placement is not served, it is no message of this model, the shard cannot."""

_LINE_WORDS = LINE // 4


class MailboxBlock:
    """`open` it in every process; the views are of the shared memory itself."""

    def __init__(self, path: Path, file: int, num_routers: int, num_shards: int) -> None:
        self.path = path
        self.num_routers = num_routers
        self.num_shards = num_shards
        self.num_bytes = _num_bytes(num_routers, num_shards)
        self._file = file
        self._map = mmap.mmap(file, self.num_bytes)
        words = np.frombuffer(self._map, dtype=np.int32)
        self.address = int(words.ctypes.data)
        self.words = memoryview(self._map).cast("q")
        pairs = num_routers * num_shards
        lines = words.reshape(-1, _LINE_WORDS)
        self._preamble = lines[0].view(np.int64)
        self.headers: npt.NDArray[np.int64] = _pairs(lines[1 : 1 + pairs], num_routers).view(np.int64)[:, :, 0]
        by_shards = _pairs(lines[1 + pairs : 1 + 2 * pairs], num_routers)
        self.refusals: npt.NDArray[np.int32] = by_shards[:, :, :3]
        self.covered: npt.NDArray[np.int32] = by_shards[:, :, 3]
        end = 1 + 2 * pairs + num_routers * (1 + router_words(num_shards) // _LINE_WORDS)
        rest = lines[1 + 2 * pairs : end].reshape(num_routers, -1)
        self.generations: npt.NDArray[np.int32] = rest[:, 0]
        self.routers: npt.NDArray[np.int32] = rest[:, _LINE_WORDS:]

    @classmethod
    def open(cls, name: str, num_routers: int, num_shards: int) -> MailboxBlock:
        """Makes the block or attaches to it. Raises OptionError for a name that is none, TransportError for a block of
        other dimensions."""
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name):
            raise OptionError(f"mailbox name is {name!r}, expected letters, digits, '.', '_' and '-'")
        sweep()
        path = FOLDER / f"{PREFIX}{name}"
        while True:
            file, is_new = _open(path, _num_bytes(num_routers, num_shards))
            try:
                fcntl.flock(file, fcntl.LOCK_SH)
                if os.fstat(file).st_nlink == 0:  # unlinked between our opening and our lock
                    os.close(file)
                    continue
                block = cls._attach(path, file, num_routers, num_shards, is_new)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.close(file)
                raise
            return block

    @classmethod
    def _attach(cls, path: Path, file: int, num_routers: int, num_shards: int, is_new: bool) -> MailboxBlock:
        expected = _num_bytes(num_routers, num_shards)
        deadline = time.monotonic() + ATTACH_S
        while os.fstat(file).st_size != expected and time.monotonic() < deadline:
            time.sleep(0.01)
        size = os.fstat(file).st_size
        if size != expected:
            raise TransportError(f"{path}: mailboxes are {size} bytes, expected {expected}")
        block = cls(path, file, num_routers, num_shards)
        if is_new:
            block._preamble[1:3] = num_routers, num_shards
            block._preamble[0] = MAGIC
        while block._preamble[0] != MAGIC and time.monotonic() < deadline:
            time.sleep(0.01)
        found = tuple(block._preamble[:3].tolist())
        if found != (MAGIC, num_routers, num_shards):
            raise TransportError(
                f"{path}: mailboxes are of {found[1]} routers and {found[2]} shards, expected {num_routers} and "
                f"{num_shards}"
            )
        return block

    def header_place(self, router_idx: int, shard_idx: int) -> int:
        """Index of a header among `words`, the block's int64, which are the fastest to look at."""
        return (1 + router_idx * self.num_shards + shard_idx) * LINE // 8

    def header_address(self, router_idx: int, shard_idx: int) -> int:
        """Bytes from the block's start."""
        return self.header_place(router_idx, shard_idx) * 8

    def router_address(self, router_idx: int) -> int:
        """Bytes from the block's start to a router's words."""
        return int(self.routers[router_idx].ctypes.data) - self.address

    def begun_place(self, router_idx: int) -> int:
        """Index among `words` of the word by which a router begins a step, which has a line for itself."""
        return (self.router_address(router_idx) + 4 * BEGUN) // 8

    def refuse(self, router_idx: int, shard_idx: int, seq: int, code: int, value: int) -> None:
        """By the shard; the router's watchdog looks for it meanwhile. code 0: nothing is refused."""
        place = self.refusals[router_idx, shard_idx]
        place[1] = 0
        place[0], place[2] = seq, value
        place[1] = code

    def close(self) -> None:
        """No view may be used afterwards. Unlinks the block if nobody else is attached; no-op if closed."""
        if self._file < 0:
            return
        with contextlib.suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = -1
        # The mapping lives as long as the views do: unmapping it under them would be a crash.


def sweep() -> int:
    """Unlinks the blocks that nobody holds: what dead instances of this user left. Returns how many."""
    removed = 0
    for path in FOLDER.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file).st_nlink and os.path.samestat(os.fstat(file), path.stat()):
                    path.unlink()
                    removed += 1
            finally:
                os.close(file)
    return removed


def _open(path: Path, num_bytes: int) -> tuple[int, bool]:
    """The file, and whether it was made here."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        try:
            file = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            try:
                return os.open(path, flags), False
            except FileNotFoundError:
                continue
        os.ftruncate(file, num_bytes)
        return file, True


def _num_bytes(num_routers: int, num_shards: int) -> int:
    lines = 1 + 2 * num_routers * num_shards + num_routers
    used = lines * LINE + num_routers * router_words(num_shards) * 4
    return -(-used // mmap.PAGESIZE) * mmap.PAGESIZE


def _pairs(lines: npt.NDArray[np.int32], num_routers: int) -> npt.NDArray[np.int32]:
    return lines.reshape(num_routers, -1, _LINE_WORDS)

"""The block of shared memory that a node's routers and shards signal through: made by whoever comes first, and gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep.errors import OptionError, TransportError
from ep.kernels.p2p_layout import BEGUN, LINE, router_words
from ep.transport import mailbox
from ep.transport.liveness import ProcessSentinel
from ep.transport.mailbox import MailboxBlock

FORK = multiprocessing.get_context("fork")
"""The processes only touch the block; a fresh interpreter would take seconds."""


@pytest.fixture
def name() -> Iterator[str]:
    yield f"test-{time.time_ns()}"
    mailbox.sweep()


def hold(name: str, pipe: Connection) -> None:
    """A process that attaches, adds one to a header and stays."""
    block = MailboxBlock.open(name, 2, 3)
    block.headers[1, 2] += 1
    pipe.send(int(block.headers[1, 2]))
    pipe.recv()
    block.close()


def start(name: str) -> tuple[ForkProcess, Connection, int]:
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=(name, theirs), daemon=True)
    process.start()
    return process, ours, ours.recv()


def test_two_processes_see_the_same_words_and_the_last_one_unlinks(name: str) -> None:
    block = MailboxBlock.open(name, 2, 3)
    block.headers[1, 2] = 41
    process, pipe, seen = start(name)
    assert seen == block.headers[1, 2] == block.words[block.header_place(1, 2)] == 42
    block.close()
    block.close()
    assert block.path.exists()  # the other one holds it
    assert mailbox.sweep() == 0
    pipe.send(None)
    process.join()
    assert not block.path.exists()


def test_a_killed_process_leaves_nothing_for_long(name: str) -> None:
    process, _, _ = start(name)
    sentinel = ProcessSentinel(process.pid or 0)
    assert not sentinel.has_ended()
    path = mailbox.FOLDER / f"{mailbox.PREFIX}{name}"
    assert path.exists()
    os.kill(process.pid or 0, signal.SIGKILL)
    while not sentinel.has_ended():
        time.sleep(0.001)
    process.join()
    assert path.exists()
    other = MailboxBlock.open(f"{name}-other", 1, 1)
    assert not path.exists()
    other.close()
    sentinel.close()


def test_a_leftover_of_the_same_name_is_not_attached_to(name: str) -> None:
    process, _, _ = start(name)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    block = MailboxBlock.open(name, 2, 3)
    assert block.headers[1, 2] == 0
    block.close()


def test_other_dimensions_and_bad_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "ATTACH_S", 0.1)
    block = MailboxBlock.open(name, 1, 2)
    with pytest.raises(TransportError, match="1 routers and 2 shards, expected 2 and 1"):
        MailboxBlock.open(name, 2, 1)
    with pytest.raises(TransportError, match="bytes, expected"):
        MailboxBlock.open(name, 40, 2)
    block.close()
    with pytest.raises(OptionError, match="mailbox name is"):
        MailboxBlock.open("../x", 1, 1)


@given(num_routers=st.integers(1, 9), num_shards=st.integers(1, 40))
def test_no_two_words_lie_in_one_line(num_routers: int, num_shards: int) -> None:
    block = MailboxBlock.open(f"test-{time.time_ns()}", num_routers, num_shards)
    lines: dict[int, tuple[int, ...]] = {}
    base, pairs = block.address, [(r, s) for r in range(num_routers) for s in range(num_shards)]
    for router, shard in pairs:
        address = block.headers[router, shard:].ctypes.data
        assert address - base == block.header_address(router, shard) == 8 * block.header_place(router, shard)
        assert block.covered[router, shard:].ctypes.data not in range(address, address + LINE)
        for kind, start in ((0, address), (1, block.refusals[router, shard].ctypes.data)):
            assert lines.setdefault((start - base) // LINE, (kind, router, shard)) == (kind, router, shard)
    for router in range(num_routers):
        own = [block.generations[router:].ctypes.data - base]
        own += range(block.router_address(router), block.router_address(router) + router_words(num_shards) * 4, LINE)
        assert block.routers.shape[1] == router_words(num_shards)
        block.routers[router, BEGUN] = router + 7
        assert block.words[block.begun_place(router)] == router + 7
        for address in own:
            assert lines.setdefault(address // LINE, (2, router)) == (2, router)
        assert max(own) + LINE <= block.num_bytes
    block.close()

"""Work between threads: done by the owner while there is one, and never lost."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ep.handover import Handover

NUM_ASKERS, NUM_ASKED = 8, 50


def test_without_an_owner_whoever_asks_does_it() -> None:
    handover = Handover()
    assert handover.call(threading.current_thread) is threading.current_thread()
    assert not handover.take()


def test_the_owner_does_all_of_it_between_its_own_doings_and_may_ask_itself() -> None:
    handover, stop = Handover(), threading.Event()

    def own() -> None:
        while not stop.is_set():
            handover.take()
        handover.close()

    def nested() -> tuple[threading.Thread, threading.Thread]:
        return threading.current_thread(), handover.call(threading.current_thread)

    def fail() -> None:
        raise ValueError("no")

    owner = threading.Thread(target=own)
    handover.open(owner)
    owner.start()
    try:
        with ThreadPoolExecutor(NUM_ASKERS) as pool:
            found = list(pool.map(lambda _: handover.call(nested), range(NUM_ASKED)))
        assert found == [(owner, owner)] * NUM_ASKED
        with pytest.raises(ValueError, match="no"):
            handover.call(fail)
    finally:
        stop.set()
        owner.join()


@pytest.mark.timeout(60)
def test_nothing_is_lost_when_the_owner_ends() -> None:
    for turn in range(100):
        handover, began = Handover(), threading.Event()

        def own(handover: Handover = handover, began: threading.Event = began, turn: int = turn) -> None:
            began.wait()
            time.sleep(turn * 1e-5)
            handover.take()
            handover.close()

        owner = threading.Thread(target=own)
        handover.open(owner)
        owner.start()
        with ThreadPoolExecutor(NUM_ASKERS) as pool:
            asked = [pool.submit(handover.call, lambda number=number: number) for number in range(NUM_ASKERS)]
            began.set()
            assert [one.result(10) for one in asked] == list(range(NUM_ASKERS))
        owner.join()

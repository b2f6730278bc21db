"""Work that other threads hand to the one that may do it, between two of its own doings."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Handover:
    """Between `open` and `close` one thread does all work; before and after, whoever asks for it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._work: deque[Callable[[], None]] = deque()
        self._owner: threading.Thread | None = None

    def open(self, owner: threading.Thread) -> None:
        """owner: a thread that calls `take` now and then, and `close` when it ends."""
        self._owner = owner

    def close(self) -> None:
        """By the owner: does what is left, for which others wait."""
        with self._lock:
            while self.take():
                pass
            self._owner = None

    def call(self, work: Callable[[], T]) -> T:
        """Has work done and returns what it returns, or raises what it raises."""
        result: Future[T] = Future()

        def do() -> None:
            try:
                result.set_result(work())
            except Exception as error:
                result.set_exception(error)

        with self._lock:
            is_handed = self._owner not in (None, threading.current_thread())
            if is_handed:
                self._work.append(do)
        return result.result() if is_handed else work()

    def take(self) -> bool:
        """By the owner: does the oldest piece of work. Whether there was one."""
        if not self._work:
            return False
        self._work.popleft()()
        return True

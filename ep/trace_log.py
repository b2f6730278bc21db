"""The load trace of a running router: what its recorder closes, appended to a file by a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections import deque
from pathlib import Path
from queue import Empty, SimpleQueue

from ep.errors import TraceError
from ep.load import Window
from ep.recorder import NUM_RECENT, LoadRecorder
from ep.trace import TraceWriter
from ep.trace_codec import Record
from ep.trace_header import TraceHeader

POLL_S = 1.0
"""How long a window stays open after its time is over, if no step comes to close it."""
_DRAIN_S = 10.0

logger = logging.getLogger(__name__)


class TraceLog:
    """Starts the file and the thread. Encoding and writing happen in the thread: the step only puts into a queue.

    When the file can no longer be written, `error` says why, the trace ends with the last whole record, and the
    recorder goes on counting. A window of a generation that the trace does not know yet waits for the change of
    placement that brings it: no reader ever sees one without the other. Raises TraceError for a path that exists or
    cannot be written.
    """

    def __init__(self, path: str | Path, header: TraceHeader, recorder: LoadRecorder) -> None:
        self.error: str | None = None
        self._writer = TraceWriter(path, header)
        self._recorder = recorder
        self._queue: SimpleQueue[Record | threading.Event | None] = SimpleQueue()
        self._generations = {header.placement.generation}
        self._early: deque[Window] = deque(maxlen=NUM_RECENT)
        self._closed = False
        recorder.on_window = self._queue.put
        self._thread = threading.Thread(target=self._run, daemon=True, name="trace")
        self._thread.start()

    @property
    def path(self) -> Path:
        return self._writer.path

    def put(self, record: Record) -> None:
        """Append a record behind those that wait."""
        self._queue.put(record)

    def read(self) -> bytes:
        """The whole file, what is counted until now included. Raises TraceError when it cannot be read."""
        self._recorder.flush()
        written = threading.Event()
        self._queue.put(written)
        written.wait(_DRAIN_S)
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise TraceError(f"{self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Write what is counted until now and end the thread; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._recorder.flush()
        self._recorder.on_window = None
        self._queue.put(None)
        self._thread.join(_DRAIN_S)

    def _run(self) -> None:
        while True:
            try:
                item = self._queue.get(timeout=POLL_S)
            except Empty:
                self._recorder.close_due()
                continue
            if item is None:
                self._writer.close()
                return
            if isinstance(item, threading.Event):
                item.set()
            elif self.error is None:
                self._append(item)

    def _append(self, record: Record) -> None:
        if isinstance(record, Window) and record.generation not in self._generations:
            self._early.append(record)
            return
        try:
            self._writer.append(record)
        except TraceError as error:
            self.error = str(error)
            logger.error("the trace ends here: %s", error)
            return
        if not isinstance(record, Window):
            self._generations.add(record.new_generation)
            early, self._early = self._early, deque(maxlen=NUM_RECENT)
            for window in early:
                self._append(window)

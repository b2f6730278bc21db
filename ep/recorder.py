"""Counts expert load on a router, step by step, into windows (ep/load.py). No I/O.

    begin_step ─> note, once per MoE layer ─> end_step ─┬─> the open window ─> recent windows, on_window
                                              drop_step ┘ (counts nothing)

One thread runs the steps; any thread may read, flush or close what is due. A step's counts are that thread's own until
`end_step` adds them to the open window under a lock, so that nobody waits for a step.

Shape legend: L MoE layers, S shards, E logical experts, K top-k, T rows of a step.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ep.link_stats import LinkStats, link_window
from ep.load import Int64Array, Window
from ep.model import ModelSpec
from ep.share import ALL_ROWS

TokenPhases = Callable[[], npt.NDArray[np.bool_] | None]
"""bool [n], True for a decode token, n the real tokens of the step at its first rows; None where it cannot be known."""

NUM_RECENT = 64
"""Closed windows that are kept in memory."""
MAX_SAMPLES = 64
"""Sampled tokens of one window."""
SAMPLE_EVERY = 8
WINDOW_S = 10.0

_PREFILL, _DECODE = 0, 1


@dataclass(frozen=True, eq=False)
class RecentLoad:
    """What a router counted lately.

    counts: int64 [L, E], pairs of each logical expert, of both phases. pairs: int64 [S], (token, slot) pairs sent to
    each shard. compute_ns: int64 [S], time of the experts alone. seconds: from the first of these steps until now, time
    without steps included; 0.0 where nothing was counted.
    """

    counts: Int64Array
    pairs: Int64Array
    compute_ns: Int64Array
    seconds: float


@dataclass
class _Step:
    """began: on the recorder's clock; wall: seconds since 1970. num_rows: rows that are tokens, known from the first
    layer on; those behind are padding. phase: of most rows; others: int64, the rows of the other one. sample_row: the
    row that is followed through all layers, -1 for none."""

    began: float
    wall: float
    num_tokens: int
    num_requests: int
    sampled: bool
    num_rows: int = -1
    num_decode_tokens: int = 0
    phase: int = _PREFILL
    others: Int64Array | None = None
    sample_row: int = -1
    layers_sampled: int = 0


@dataclass
class _OpenWindow:
    """began, ended: of its first and last step, on the recorder's clock. before: the links' counters at its start."""

    start: float
    began: float
    ended: float
    first_step: int
    generation: int
    before: list[list[int]]
    counts: Int64Array
    num_tokens: list[int] = field(default_factory=lambda: [0, 0])
    samples: list[npt.NDArray[np.int16]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Closed:
    """began, ended: on the recorder's clock."""

    began: float
    ended: float
    window: Window


class LoadRecorder:
    """A router's counters, cut into windows of window_s seconds and at every change of the placement's generation.

    A window without steps does not exist. One token of every sample_every-th step is followed through all layers, at
    most MAX_SAMPLES in a window. on_window, if set, is called with every window as it closes, in order; it must return
    at once, and it may be called from any of the recorder's methods. before_close, if set, is called before a window is
    closed because of its age or by `flush`, to `add_counts` what is not in it yet. clock: seconds that never go back.

    Decode tokens are those of requests that enter a step with one token. What token_phases cannot tell is taken from
    the step as a whole: decode if it has a token per request, else prefill.
    """

    def __init__(
        self,
        spec: ModelSpec,
        num_shards: int,
        router: int = 0,
        window_s: float = WINDOW_S,
        sample_every: int = SAMPLE_EVERY,
        token_phases: TokenPhases | None = None,
        on_window: Callable[[Window], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert spec.num_experts <= np.iinfo(np.int16).max, "sampled ids are int16"
        self.router = router
        self.window_s = window_s
        self.on_window = on_window
        self.before_close: Callable[[], None] | None = None
        self._shape = (spec.num_moe_layers, spec.num_experts)
        self._num_shards = num_shards
        self._sample_every = sample_every
        self._token_phases = token_phases
        self._clock = clock
        self._random = random.Random(router)
        self._lock = threading.Lock()
        self._num_steps = 0
        self._step: _Step | None = None
        self._counts = np.zeros((self._shape[0], 2, self._shape[1]), dtype=np.int64)
        self._sample = np.zeros((self._shape[0], spec.top_k), dtype=np.int16)
        self._elsewhere = np.zeros_like(self._counts)
        self._open: _OpenWindow | None = None
        self._links: list[list[int]] = []
        """The links' counters at the end of the last step, or before the first one of the next window."""
        self._recent: deque[_Closed] = deque(maxlen=NUM_RECENT)

    def begin_step(self, links: Sequence[LinkStats], num_tokens: int, num_requests: int) -> None:
        """What is noted from here on belongs to one step of num_tokens tokens (padding not counted)."""
        self.close_due()
        with self._lock:
            if self._open is None:
                self._links = [link.counters() for link in links]
        sampled = self._num_steps % self._sample_every == 0
        self._step = _Step(self._clock(), time.time(), num_tokens, num_requests, sampled)
        self._counts.fill(0)

    def note(self, layer_pos: int, topk_ids: npt.NDArray[np.integer], rows: slice = ALL_ROWS) -> None:
        """A layer's chosen logical experts, [T, K]; rows: the ones of them that are this router's, the same in every
        layer. Outside of a step nothing is recorded."""
        step = self._step
        if step is None:
            return
        if step.num_rows < 0:
            self._read_phases(step, len(topk_ids), rows)
        ids = topk_ids[rows][: step.num_rows]
        counts, num_experts = self._counts[layer_pos], self._shape[1]
        counts[step.phase] += np.bincount(ids.ravel(), minlength=num_experts)
        if step.others is not None:
            others = np.bincount(ids[step.others].ravel(), minlength=num_experts)
            counts[step.phase] -= others
            counts[1 - step.phase] += others
        if step.sample_row >= 0:
            self._sample[layer_pos] = ids[step.sample_row]
            step.layers_sampled += 1

    def drop_step(self) -> None:
        """The step failed: forget what was noted. Its traffic stays with the links, which did carry it."""
        self._step = None

    def end_step(self, links: Sequence[LinkStats], generation: int) -> None:
        """The step's tokens are out; it ran under this generation of the placement.

        A step in which no layer was noted (nothing was scheduled) does not count.
        """
        step, self._step = self._step, None
        if step is None or step.num_rows < 0:
            return
        now = self._clock()
        with self._lock:
            if self._open is not None and self._open.generation != generation:
                self._close()
            if self._open is None:
                counts = np.zeros_like(self._counts)
                self._open = _OpenWindow(step.wall, step.began, now, self._num_steps, generation, self._links, counts)
            window = self._open
            window.counts += self._counts
            window.num_tokens[_DECODE] += step.num_decode_tokens
            window.num_tokens[_PREFILL] += step.num_rows - step.num_decode_tokens
            if step.layers_sampled == self._shape[0] and len(window.samples) < MAX_SAMPLES:
                window.samples.append(self._sample.copy())
            window.step_seconds.append(now - step.began)
            window.ended = now
            self._num_steps += 1
            self._links = [link.counters() for link in links]
        self.close_due()

    def add_step(
        self, links: Sequence[LinkStats], wall: float, seconds: float, num_tokens: int, num_decode: int, generation: int
    ) -> None:
        """A step whose layers are counted elsewhere (`add_counts`): it began at `wall`, seconds since 1970, and took
        `seconds`; the first num_decode of its tokens are decode."""
        now = self._clock()
        with self._lock:
            if self._open is not None and self._open.generation != generation:
                self._close()
            if self._open is None:
                self._links = [link.counters() for link in links]
                counts = np.zeros_like(self._counts)
                self._open = _OpenWindow(wall, now - seconds, now, self._num_steps, generation, self._links, counts)
            window = self._open
            window.num_tokens[_DECODE] += num_decode
            window.num_tokens[_PREFILL] += num_tokens - num_decode
            window.step_seconds.append(seconds)
            window.ended = now
            self._num_steps += 1
            self._links = [link.counters() for link in links]
        self.close_due()

    def add_counts(self, pairs: Int64Array, links: Sequence[LinkStats]) -> None:
        """int64 [2, L, E], prefill and decode: what the steps of the open window chose, or those of the next one."""
        with self._lock:
            self._elsewhere += pairs.transpose(1, 0, 2)
            if self._open is not None:
                self._open.counts += self._elsewhere
                self._elsewhere.fill(0)
                self._links = [link.counters() for link in links]

    def close_due(self) -> None:
        """Close the open window if its time is over; also for windows that no step comes to close."""
        with self._lock:
            is_due = self._open is not None and self._clock() - self._open.began >= self.window_s
        if is_due and self.before_close is not None:
            self.before_close()
        with self._lock:
            if self._open is not None and self._clock() - self._open.began >= self.window_s:
                self._close()

    def flush(self) -> None:
        """Close the open window now."""
        if self.before_close is not None:
            self.before_close()
        with self._lock:
            if self._open is not None:
                self._close()

    def recent(self) -> tuple[Window, ...]:
        """The last NUM_RECENT closed windows, oldest first."""
        with self._lock:
            return tuple(closed.window for closed in self._recent)

    def totals_since(self, seconds: float) -> RecentLoad:
        """The steps of the last `seconds` seconds, the open window's among them; a window counts wholly or not at all.

        No more than NUM_RECENT windows are remembered.
        """
        counts = np.zeros(self._shape, dtype=np.int64)
        pairs, compute_ns = (np.zeros(self._num_shards, dtype=np.int64) for _ in range(2))
        with self._lock:
            now = self._clock()
            seen = [closed for closed in self._recent if closed.ended > now - seconds]
            if self._open is not None:
                seen.append(_Closed(self._open.began, self._open.ended, self._window(self._open)))
        for one in seen:
            counts += one.window.counts("all")
            pairs += [link.pairs for link in one.window.links]
            compute_ns += [link.compute_ns for link in one.window.links]
        return RecentLoad(counts, pairs, compute_ns, now - seen[0].began if seen else 0.0)

    def _read_phases(self, step: _Step, num_rows: int, rows: slice) -> None:
        """Which of this router's rows of the step's num_rows are tokens, and of which phase."""
        decode = self._token_phases() if self._token_phases is not None else None
        if decode is None or len(decode) > num_rows:
            step.num_rows = len(range(min(step.num_tokens, num_rows))[rows])
            if step.num_tokens == step.num_requests:
                step.num_decode_tokens = step.num_rows
        else:
            decode = decode[rows]
            step.num_rows = len(decode)
            step.num_decode_tokens = int(np.count_nonzero(decode))
            if 0 < step.num_decode_tokens < step.num_rows:
                step.others = np.flatnonzero(~decode if 2 * step.num_decode_tokens > step.num_rows else decode)
        step.phase = _DECODE if 2 * step.num_decode_tokens > step.num_rows else _PREFILL
        if step.sampled and step.num_rows:
            step.sample_row = self._random.randrange(step.num_rows)

    def _close(self) -> None:
        """Under the lock, with a window open."""
        assert self._open is not None
        closed, self._open = self._open, None
        window = self._window(closed)
        self._recent.append(_Closed(closed.began, closed.ended, window))
        if self.on_window is not None:
            self.on_window(window)

    def _window(self, window: _OpenWindow) -> Window:
        """The window as it stands after its last step."""
        p50, p99 = np.percentile(window.step_seconds, [50, 99])
        layers, top_k = self._sample.shape
        return Window(
            start=window.start,
            seconds=window.ended - window.began,
            first_step=window.first_step,
            num_steps=len(window.step_seconds),
            generation=window.generation,
            num_prefill_tokens=window.num_tokens[_PREFILL],
            num_decode_tokens=window.num_tokens[_DECODE],
            prefill=window.counts[:, _PREFILL].copy(),
            decode=window.counts[:, _DECODE].copy(),
            links=tuple(map(link_window, window.before, self._links)),
            sampled_ids=np.array(window.samples, dtype=np.int16).reshape(-1, layers, top_k),
            step_seconds_p50=float(p50),
            step_seconds_p99=float(p99),
            router=self.router,
        )

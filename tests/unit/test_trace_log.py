"""The trace of a running router: written behind the step's back, readable at any time."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ep.errors import TraceError
from ep.load import PlacementChange
from ep.placement import even_split
from ep.recorder import LoadRecorder
from ep.trace import parse_trace, read_trace
from ep.trace_header import TraceHeader
from ep.trace_log import POLL_S, TraceLog
from tests.unit.shards import NUM_EXPERTS, NUM_LAYERS
from tests.unit.test_recorder import NUM_SHARDS, SPEC, Rig, plain

PLACEMENT = even_split(NUM_LAYERS, NUM_EXPERTS, NUM_SHARDS)
HEADER = TraceHeader.now("test", SPEC, PLACEMENT, ["a"] * NUM_SHARDS, ["a"], {"ep": "0"})
CHANGE = PlacementChange(0.0, 0, replace(PLACEMENT, generation=1), "test", 0, 0.1, 0.2)


def start(path: Path, window_s: float = 1e6) -> tuple[Rig, TraceLog]:
    rig = Rig(window_s=window_s)
    return rig, TraceLog(path, HEADER, rig.recorder)


def test_reading_takes_what_is_counted_until_now(tmp_path: Path) -> None:
    rig, log = start(tmp_path / "a.trace")
    for num_steps in (1, 2):
        rig.run(plain())
        trace = parse_trace(log.read(), "live")
        assert sum(window.num_steps for window in trace.windows) == num_steps
    assert parse_trace(log.read(), "live").header == HEADER
    rig.run(plain())
    log.close()
    log.close()
    assert sum(window.num_steps for window in read_trace(log.path).windows) == 3


def test_a_window_whose_time_is_over_is_written_without_a_step(tmp_path: Path) -> None:
    recorder = LoadRecorder(SPEC, NUM_SHARDS, window_s=0.05)
    log = TraceLog(tmp_path / "a.trace", HEADER, recorder)
    rig = Rig()
    recorder.begin_step(rig.links, 1, 1)
    recorder.note(0, plain().ids[0, :1])
    recorder.end_step(rig.links, 0)
    deadline = time.monotonic() + 20 * POLL_S
    while not read_trace(log.path).windows and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(read_trace(log.path).windows) == 1
    log.close()


def test_no_window_comes_before_its_placement(tmp_path: Path) -> None:
    """Routers go over before the change is noted; the file must be readable in between."""
    rig, log = start(tmp_path / "a.trace")
    rig.run(plain(generation=0))
    rig.run(plain(generation=1))
    assert [window.generation for window in parse_trace(log.read(), "live").windows] == [0]
    log.put(CHANGE)
    rig.run(plain(generation=1))
    trace = parse_trace(log.read(), "live")
    assert [window.generation for window in trace.windows] == [0, 1, 1]
    assert trace.changes == (CHANGE,)
    log.close()


def test_a_full_disk_ends_the_trace_and_nothing_else(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    rig, log = start(tmp_path / "a.trace")
    with full.open("wb") as device:
        os.dup2(device.fileno(), log._writer._fd)
    rig.run(plain())
    log.read()
    assert log.error == f"{log.path}: No space left on device"
    assert rig.recorder.totals_since(60.0).counts.sum() > 0
    log.close()


def test_a_path_that_exists(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    path.write_bytes(b"kept")
    with pytest.raises(TraceError, match="exists already"):
        start(path)
    assert path.read_bytes() == b"kept"

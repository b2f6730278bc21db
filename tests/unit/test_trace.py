"""The load trace: what is written comes back, at whatever byte the writer was stopped, and nothing else is taken."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep.errors import TraceError
from ep.load import NUM_ROUND_TRIP_BUCKETS, LinkWindow, PlacementChange, Window
from ep.model import ModelSpec
from ep.presets import load_preset
from ep.trace import Trace, TraceTail, TraceWriter, parse_trace, read_trace
from ep.trace_codec import decode, encode, frame, pack_array, unpack_array
from ep.trace_header import TraceSpec, decode_header, encode_header
from tests.traces import SMALL, TraceCase, in_order, make_trace, same_record, write_trace
from tests.unit.test_placement import placements

counts = st.integers(0, 2**63 - 1)
times = st.floats(0, 1e12)


def arrays(dtype: type[np.integer], low: int, high: int, *shape: int) -> st.SearchStrategy[np.ndarray]:
    size = int(np.prod(shape))
    values = st.lists(st.integers(low, high), min_size=size, max_size=size)
    return values.map(lambda flat: np.array(flat, dtype=dtype).reshape(shape))


def count_arrays(*shape: int) -> st.SearchStrategy[np.ndarray]:
    highest = st.sampled_from([1, 255, 256, 2**16, 2**32, 2**63 - 1])
    return highest.flatmap(lambda high: arrays(np.int64, 0, high, *shape))


@st.composite
def windows(draw: st.DrawFn) -> Window:
    layers, experts, shards, samples, top_k = (draw(st.integers(low, 3)) for low in (1, 1, 0, 0, 1))
    links = tuple(
        LinkWindow(*(draw(counts) for _ in range(6)), draw(count_arrays(NUM_ROUND_TRIP_BUCKETS))) for _ in range(shards)
    )
    return Window(
        *(draw(times), draw(times)),
        *(draw(counts) for _ in range(5)),
        prefill=draw(count_arrays(layers, experts)),
        decode=draw(count_arrays(layers, experts)),
        links=links,
        sampled_ids=draw(arrays(np.int16, -1, 2**15 - 1, samples, layers, top_k)),
        step_seconds_p50=draw(times),
        step_seconds_p99=draw(times),
        router=draw(st.integers(0, 9)),
    )


changes = st.builds(
    lambda plain, placement, reason: PlacementChange(plain[0], 3, placement, reason, plain[1], plain[2], plain[3]),
    st.tuples(times, counts, times, st.floats(-1, 1)),
    placements(),
    st.text(max_size=30),
)


@given(st.one_of(windows(), changes))
def test_a_record_comes_back(record: Window | PlacementChange) -> None:
    kind, _checksum, body = msgpack.unpackb(encode(record))
    again = decode(kind, body)
    assert again is not None and same_record(again, record)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_arrays_take_the_narrowest_integers(one: int, other: int) -> None:
    array = np.array([[one, other]])
    packed = pack_array(array)
    np.testing.assert_array_equal(unpack_array(packed, np.int64), array)
    narrower = {1: None, 2: np.int8, 4: np.int16, 8: np.int32}[np.dtype(packed[1]).itemsize]
    unsigned = narrower and np.dtype(f"u{np.dtype(narrower).itemsize}")
    for dtype in filter(None, (narrower, unsigned)):
        assert not np.array_equal(array.astype(dtype), array)


@pytest.fixture(scope="module")
def small() -> Trace:
    return make_trace(SMALL)


def test_a_file_comes_back(small: Trace, tmp_path: Path) -> None:
    again = read_trace(write_trace(small, tmp_path / "load.trace"))
    assert again.header == small.header and again.warnings == ()
    assert len(again.windows) == len(small.windows) and all(map(same_record, again.windows, small.windows))
    assert len(again.changes) == len(small.changes) and all(map(same_record, again.changes, small.changes))
    assert again.current == small.changes[-1].placement and set(again.placements) == {0, 1}


def test_cut_off_at_any_byte(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = TraceCase("mixtral-8x7b", True, num_shards=1, num_windows=2, change_at=1, num_redundant=0, num_samples=1)
    trace = make_trace(case)
    data = write_trace(trace, tmp_path / "load.trace").read_bytes()
    header_bytes = len(encode_header(trace.header))
    ends = np.cumsum([header_bytes, *(len(encode(record)) for record in in_order(trace))])
    assert ends[-1] == len(data)
    for cut in range(len(data) + 1):
        caplog.clear()
        if cut < header_bytes:
            with pytest.raises(TraceError, match="is empty" if cut == 0 else "cut off within its header") as error:
                parse_trace(data[:cut], "load.trace")
            assert "\n" not in str(error.value)
            continue
        again = parse_trace(data[:cut], "load.trace")
        whole = int(np.searchsorted(ends, cut, side="right")) - 1
        assert len(again.windows) + len(again.changes) == whole
        torn = cut - ends[whole]
        assert again.warnings == tuple(record.getMessage() for record in caplog.records)
        assert [f"last {torn} bytes" in warning for warning in again.warnings] == [True] * bool(torn)
        assert all(record.levelno == logging.WARNING for record in caplog.records)


@given(st.data())
def test_a_changed_byte_is_noticed(data: st.DataObject) -> None:
    """An error, or the bytes from there on left out as a torn tail; never another number."""
    trace = make_trace(SMALL)
    raw = bytearray(b"".join([encode_header(trace.header), *map(encode, in_order(trace))]))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        again = parse_trace(bytes(raw), "load.trace")
    except TraceError as error:
        assert "\n" not in str(error) and str(error).startswith("load.trace: ")
        return
    assert again.header == trace.header and again.warnings
    originals = {id(record): record for record in in_order(trace)}.values()
    for record in in_order(again):
        assert any(same_record(record, original) for original in originals)


def test_a_trace_is_read_while_it_grows(small: Trace, tmp_path: Path) -> None:
    path = tmp_path / "load.trace"
    records = list(in_order(small))
    with TraceWriter(path, small.header) as writer:
        tail = TraceTail(path)
        assert tail.header == small.header and tail.poll() == []
        writer.append(records[0])
        (first,) = tail.poll()
        assert same_record(first, records[0]) and tail.poll() == []
        torn = encode(records[1])
        with path.open("ab") as file:
            file.write(torn[:100])
        assert tail.poll() == []
        with path.open("ab") as file:
            file.write(torn[100:])
        writer.append(records[2])
        second, third = tail.poll()
        assert same_record(second, records[1]) and same_record(third, records[2])


def test_a_killed_writer_leaves_whole_records(small: Trace, tmp_path: Path) -> None:
    path = tmp_path / "load.trace"
    code = (
        "import sys\n"
        "from tests.traces import SMALL, make_trace\n"
        "from ep.trace import TraceWriter\n"
        "trace = make_trace(SMALL)\n"
        "writer = TraceWriter(sys.argv[1], trace.header)\n"
        "print('ready', flush=True)\n"
        "while True: writer.append(trace.windows[0])\n"
    )
    root = Path(__file__).parents[2]
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, cwd=root)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        while path.stat().st_size < 100_000:
            pass
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
    trace = read_trace(path)
    assert trace.windows and all(same_record(window, small.windows[0]) for window in trace.windows)


def test_a_full_disk_leaves_the_records_before(small: Trace, tmp_path: Path) -> None:
    """The limit on a file's size stands for the disk's: the write that meets it comes back short, the next fails."""
    path = tmp_path / "load.trace"
    code = (
        "import resource, signal, sys\n"
        "from ep.errors import TraceError\n"
        "from tests.traces import SMALL, make_trace\n"
        "from ep.trace import TraceWriter\n"
        "trace = make_trace(SMALL)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "writer = TraceWriter(sys.argv[1], trace.header)\n"
        "writer.append(trace.windows[0])\n"
        "size = writer.path.stat().st_size\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size + 500, resource.RLIM_INFINITY))\n"
        "try: writer.append(trace.windows[1])\n"
        "except TraceError as error: print(error)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "writer.append(trace.windows[2])\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout == f"{path}: File too large\n"
    trace = read_trace(path)
    assert trace.warnings == () and len(trace.windows) == 2
    assert all(map(same_record, trace.windows, (small.windows[0], small.windows[2])))


def test_nothing_is_written_over(small: Trace, tmp_path: Path) -> None:
    path = write_trace(small, tmp_path / "load.trace")
    before = path.read_bytes()
    with pytest.raises(TraceError, match="exists already"):
        TraceWriter(path, small.header)
    assert path.read_bytes() == before
    with pytest.raises(TraceError, match="No such file"):
        TraceWriter(tmp_path / "missing" / "load.trace", small.header)


def test_bad_files(small: Trace, tmp_path: Path) -> None:
    header = encode_header(small.header)
    cases = {
        b"": "is empty",
        b"not a trace at all": "is no load trace",
        msgpack.packb({"version": 1}): "is no load trace",
        header[:7]: "cut off within its header",
        encode_header(replace(small.header, version=2)): "is a trace of version 2, this ep reads up to version 1",
        encode_header(replace(small.header, version=0)): "is a trace of version 0, this ep reads up to version 1",
        header + msgpack.packb([1, 2]): f"record at byte {len(header)} is damaged",
        header + b"\xc1": f"record at byte {len(header)} is damaged",
        header + frame("window", {"start": 1.0}): f"record at byte {len(header)} is damaged",
        header + encode(replace(small.windows[0], generation=7)): "generation 7, but the trace has no such placement",
        header + encode(replace(small.windows[0], router=1)): "router is 1, expected 0 to 0",
        header + encode(replace(small.windows[0], links=small.windows[0].links[1:])): "sizes are",
    }
    path = tmp_path / "load.trace"
    for data, message in cases.items():
        path.write_bytes(data)
        with pytest.raises(TraceError, match=message) as error:
            read_trace(path)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    for missing in (tmp_path / "missing", tmp_path):
        with pytest.raises(TraceError, match=str(missing)):
            read_trace(missing)


def test_records_of_kinds_to_come_are_skipped(small: Trace) -> None:
    data = encode_header(small.header) + frame("canary", {"ok": True}) + encode(small.windows[0])
    trace = parse_trace(data, "load.trace")
    assert len(trace.windows) == 1 and trace.warnings == ("load.trace: 1 records of kind 'canary' skipped: unknown",)


def test_a_header_has_what_a_report_needs_of_a_model() -> None:
    """Figures of the published models: one expert is 2 x [2048, 7168] and [7168, 2048] in FP8 and their scales."""
    deepseek = TraceSpec.of(load_preset("deepseek-v3").spec)
    assert (deepseek.num_moe_layers, deepseek.moe_layers[0], deepseek.num_experts) == (58, 3, 256)
    assert deepseek.expert_bytes == 3 * (2048 * 7168 + 4 * 16 * 56)
    assert deepseek.kv_bytes_per_token == (512 + 64) * 2 * 61
    mixtral_spec: ModelSpec = load_preset("mixtral-8x7b").spec
    mixtral = TraceSpec.of(mixtral_spec)
    assert mixtral.expert_bytes == 3 * 4096 * 14336 * 2
    assert mixtral.kv_bytes_per_token == 2 * 8 * 128 * 2 * 32
    header = make_trace(TraceCase(model="mixtral-8x7b", num_windows=1, change_at=None)).header
    assert decode_header(encode_header(header), "x") == (header, len(encode_header(header)))


def test_windows_of_the_largest_model_stay_small() -> None:
    trace = make_trace(TraceCase(num_shards=32, num_windows=1, change_at=None))
    assert len(encode(trace.windows[0])) < 60_000

"""The load trace: an append-only file of windows and changes of placement, readable while it grows.

The file is a stream of msgpack values: the header (ep/trace_header.py), then records (ep/trace_codec.py). Each is
appended with one write, so a writer that is killed leaves at most one torn record at the end.
"""

from __future__ import annotations

import logging
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgpack

from ep.errors import PlacementError, TraceError
from ep.load import PlacementChange, Window
from ep.placement import Placement
from ep.trace_codec import Record, decode, encode
from ep.trace_header import TraceHeader, decode_header, encode_header, make_unpacker

_BAD_BODY = (KeyError, TypeError, ValueError, PlacementError)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Trace:
    """A trace as far as it was written when it was read. source: the file's path, or what stands for it."""

    source: str
    header: TraceHeader
    windows: tuple[Window, ...]
    changes: tuple[PlacementChange, ...]
    warnings: tuple[str, ...] = ()

    @property
    def placements(self) -> dict[int, Placement]:
        """By generation."""
        return {p.generation: p for p in (self.header.placement, *(change.placement for change in self.changes))}

    @property
    def current(self) -> Placement:
        """The placement of the newest generation."""
        return max(self.placements.values(), key=lambda placement: placement.generation)


class TraceWriter:
    """Starts a trace and appends to it; for one thread at a time.

    The path must be free: a trace is never mixed with another's. Raises TraceError when the path cannot be written.
    """

    def __init__(self, path: str | Path, header: TraceHeader) -> None:
        self.path = Path(path)
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            raise TraceError(f"{path}: exists already, expected a path for a new trace") from None
        except OSError as error:
            raise TraceError(f"{path}: {error.strerror}") from error
        self._num_bytes = 0
        self._write(encode_header(header))

    def append(self, record: Record) -> None:
        """Raises TraceError when it cannot be written; the file then ends with the record before it."""
        self._write(encode(record))

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        try:
            written = os.write(self._fd, data)
            while written < len(data):  # a full disk or a signal: the rest, or the reason why not
                written += os.write(self._fd, data[written:])
        except OSError as error:
            with suppress(OSError):  # the reason of the first error is the one to tell
                os.ftruncate(self._fd, self._num_bytes)
            raise TraceError(f"{self.path}: {error.strerror}") from error
        self._num_bytes += len(data)


class TraceTail:
    """Follows a trace that is still being written. Raises TraceError as `read_trace` does."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self.header, self._offset = decode_header(_read_file(self._path), str(path))

    def poll(self) -> list[Record]:
        """The whole records that came since the last call."""
        data = _read_file(self._path, self._offset)
        records, size, _warnings = _read_records(data, self._offset, self.header, str(self._path))
        self._offset += size
        return records


def read_trace(path: str | Path) -> Trace:
    """The whole trace; a torn record at its end is left out with a warning.

    Raises TraceError for a file that is missing, empty, no trace, of a newer version or damaged.
    """
    return parse_trace(_read_file(Path(path)), str(path))


def parse_trace(data: bytes, source: str) -> Trace:
    """The trace in `data`, the bytes of a trace file; `source` names it in errors. Raises TraceError."""
    header, start = decode_header(data, source)
    records, size, warnings = _read_records(data[start:], start, header, source)
    if torn := len(data) - start - size:
        warnings.append(f"{source}: skipped the last {torn} bytes, no whole record: its writer died or still writes")
    for warning in warnings:
        logger.warning("%s", warning)
    windows = tuple(record for record in records if isinstance(record, Window))
    changes = tuple(record for record in records if isinstance(record, PlacementChange))
    trace = Trace(source, header, windows, changes, tuple(warnings))
    unknown = {window.generation for window in windows} - trace.placements.keys()
    if unknown:
        raise TraceError(f"{source}: windows of generation {min(unknown)}, but the trace has no such placement")
    return trace


def _read_file(path: Path, offset: int = 0) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read()
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from error


def _read_records(data: bytes, offset: int, header: TraceHeader, source: str) -> tuple[list[Record], int, list[str]]:
    """The whole records at the start of `data`, how many bytes they take, and warnings. offset: of data in the file."""
    unpacker = make_unpacker(data)
    records: list[Record] = []
    unknown: dict[str, int] = {}
    start = 0
    while True:
        try:
            kind, checksum, body = unpacker.unpack()
            if checksum != zlib.crc32(body):
                raise ValueError("its checksum is another")
            record = decode(kind, body)
            if record is not None:
                _check(record, header)
        except msgpack.OutOfData:
            break
        except (*_BAD_BODY, msgpack.UnpackException) as error:
            raise TraceError(f"{source}: the record at byte {offset + start} is damaged: {error}") from error
        start = unpacker.tell()
        if record is None:
            unknown[kind] = unknown.get(kind, 0) + 1
        else:
            records.append(record)
    warnings = [f"{source}: {count} records of kind {kind!r} skipped: unknown" for kind, count in unknown.items()]
    return records, start, warnings


def _check(record: Record, header: TraceHeader) -> None:
    """Raises ValueError where a record does not fit the trace's model and shards."""
    layers, experts, shards = header.spec.num_moe_layers, header.spec.num_experts, header.placement.num_shards
    if isinstance(record, Window):
        found: tuple[int, ...] = (*record.prefill.shape, *record.decode.shape, *record.sampled_ids.shape[1:])
        found = (*found, len(record.links))
        expected: tuple[int, ...] = (layers, experts, layers, experts, layers, header.spec.top_k, shards)
        known_router = 0 <= record.router < len(header.node_of_router)
        if not known_router:
            raise ValueError(f"router is {record.router}, expected 0 to {len(header.node_of_router) - 1}")
    else:
        slots = record.placement
        found = (slots.num_moe_layers, slots.num_experts, slots.num_shards)
        expected = (layers, experts, shards)
    if found != expected:
        raise ValueError(f"sizes are {found}, expected {expected}")

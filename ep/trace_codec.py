"""Records of a load trace as bytes and back: msgpack, with arrays in the narrowest integers that hold them, compressed.

A record is the msgpack array [kind, crc32 of the body, body]; the body is a msgpack map of the record's fields. Arrays
are [shape, dtype, bytes]: their bytes are regrouped so that all first bytes come first, then all second ones (most of
which are zero), and deflated.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from ep.load import NUM_ROUND_TRIP_BUCKETS, LinkWindow, PlacementChange, Window
from ep.placement import Placement

Record = Window | PlacementChange
WINDOW, CHANGE = "window", "change"

_LEVEL = 1
_LINK_NUMBERS = tuple(field.name for field in fields(LinkWindow) if field.name != "round_trips")


def encode(record: Record) -> bytes:
    """One record as it stands in the file."""
    if isinstance(record, Window):
        return frame(WINDOW, _window_fields(record))
    return frame(CHANGE, _plain(record) | {"placement": pack_placement(record.placement)})


def decode(kind: str, body: bytes) -> Record | None:
    """The record of a checked body; None for a kind that this version does not know. Raises ValueError, TypeError,
    KeyError or PlacementError for a body that `encode` could not have made."""
    if kind not in (WINDOW, CHANGE):
        return None
    table = msgpack.unpackb(body, use_list=False)
    if kind == CHANGE:
        return PlacementChange(**{**table, "placement": unpack_placement(table["placement"])})
    numbers = unpack_array(table["links"], np.int64).tolist()
    round_trips = unpack_array(table["round_trips"], np.int64)
    if round_trips.shape != (len(numbers), NUM_ROUND_TRIP_BUCKETS):
        raise ValueError(f"round trips have shape {round_trips.shape}, expected {len(numbers), NUM_ROUND_TRIP_BUCKETS}")
    rest = {name: value for name, value in table.items() if name != "round_trips"}
    rest["links"] = tuple(
        LinkWindow(**dict(zip(_LINK_NUMBERS, row, strict=True)), round_trips=histogram)
        for row, histogram in zip(numbers, round_trips, strict=True)
    )
    for name, dtype in (("prefill", np.int64), ("decode", np.int64), ("sampled_ids", np.int16)):
        rest[name] = unpack_array(table[name], dtype)
    return Window(**rest)


def frame(kind: str, table: Mapping[str, Any]) -> bytes:
    """[kind, crc32, body]."""
    body = msgpack.packb(dict(table))
    return msgpack.packb((kind, zlib.crc32(body), body))


def pack_placement(placement: Placement) -> dict[str, Any]:
    """Plain values, smaller than `Placement.to_dict` gives them."""
    return {
        "generation": placement.generation,
        "num_experts": placement.num_experts,
        "slots": pack_array(placement.slots),
    }


def unpack_placement(table: Mapping[str, Any]) -> Placement:
    """The inverse of `pack_placement`. Raises ValueError, TypeError, KeyError, PlacementError."""
    return Placement(table["generation"], table["num_experts"], unpack_array(table["slots"], np.int32))


def pack_array(array: npt.NDArray[np.integer]) -> tuple[list[int], str, bytes]:
    """Shape, dtype and deflated bytes of an integer array."""
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    dtype = np.min_scalar_type(high if low >= 0 else min(low, -high - 1)).newbyteorder("<")
    narrow = np.ascontiguousarray(array, dtype=dtype)
    planes = np.frombuffer(narrow.tobytes(), dtype=np.uint8).reshape(-1, dtype.itemsize).T
    return list(array.shape), dtype.str, zlib.compress(planes.tobytes(), _LEVEL)


def unpack_array(packed: Any, dtype: type[np.integer]) -> npt.NDArray[Any]:
    """The array, read-only. Raises ValueError or TypeError for anything that `pack_array` could not have made."""
    shape, stored, deflated = packed
    narrow = np.dtype(stored)
    if narrow.kind not in "iu" or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"array of {stored} and shape {shape}")
    num_bytes = math.prod(shape) * narrow.itemsize
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(deflated, num_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"array does not inflate: {error}") from error
    if len(raw) != num_bytes:
        raise ValueError(f"array of shape {shape} has {len(raw)} bytes, expected {num_bytes}")
    planes = np.frombuffer(raw, dtype=np.uint8).reshape(narrow.itemsize, -1)
    array = np.frombuffer(planes.T.tobytes(), dtype=narrow).reshape(shape).astype(dtype)
    array.setflags(write=False)
    return array


def _plain(record: Record) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _window_fields(window: Window) -> dict[str, Any]:
    links = np.array([[getattr(link, name) for name in _LINK_NUMBERS] for link in window.links], dtype=np.int64)
    round_trips = np.array([link.round_trips for link in window.links], dtype=np.int64)
    table = _plain(window) | {
        "links": pack_array(links.reshape(-1, len(_LINK_NUMBERS))),
        "round_trips": pack_array(round_trips.reshape(-1, NUM_ROUND_TRIP_BUCKETS)),
    }
    return table | {name: pack_array(getattr(window, name)) for name in ("prefill", "decode", "sampled_ids")}

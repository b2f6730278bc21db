"""The header of a load trace: the model, where its experts lay at the start, and how it stands in the file.

The first msgpack value of a trace is ["ep-trace", version, crc32, body]; the body is a msgpack map of the fields.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import msgpack

from ep.errors import PlacementError, TraceError
from ep.model import ModelSpec
from ep.placement import Placement
from ep.trace_codec import pack_placement, unpack_placement

VERSION = 1
MAGIC = "ep-trace"

_START = msgpack.packb((MAGIC, 0, 0, b""))[: 2 + len(MAGIC)]


@dataclass(frozen=True)
class TraceSpec:
    """What a report needs of a model. moe_layers: layer numbers as the checkpoint counts them.

    expert_bytes: one routed expert as the checkpoint stores it. kv_bytes_per_token: KV cache of one token in all layers
    in bf16: (kv_lora_rank + qk_rope_head_dim) values a layer for MLA, 2 x num_kv_heads x head_dim otherwise.
    """

    family: str
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    num_groups: int
    topk_groups: int
    hidden_size: int
    moe_intermediate_size: int
    quant_block: tuple[int, int] | None
    expert_bytes: int
    kv_bytes_per_token: int

    @classmethod
    def of(cls, spec: ModelSpec) -> TraceSpec:
        mla = spec.mla
        values = mla.kv_lora_rank + mla.qk_rope_head_dim if mla else 2 * spec.num_kv_heads * spec.head_dim
        return cls(
            family=spec.family,
            moe_layers=spec.moe_layers,
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            num_groups=spec.num_groups,
            topk_groups=spec.topk_groups,
            hidden_size=spec.hidden_size,
            moe_intermediate_size=spec.moe_intermediate_size,
            quant_block=spec.quant_block,
            expert_bytes=spec.expert_bytes,
            kv_bytes_per_token=2 * values * spec.num_layers,
        )

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)


@dataclass(frozen=True)
class TraceHeader:
    """created: ISO 8601, UTC. node_of_shard, node_of_router: node names. versions: of ep, vllm and torch."""

    created: str
    model: str
    spec: TraceSpec
    placement: Placement
    node_of_shard: tuple[str, ...]
    node_of_router: tuple[str, ...]
    versions: dict[str, str]
    version: int = VERSION

    @classmethod
    def now(
        cls,
        model: str,
        spec: ModelSpec,
        placement: Placement,
        node_of_shard: Sequence[str],
        node_of_router: Sequence[str],
        versions: Mapping[str, str],
    ) -> TraceHeader:
        """The header of a trace that starts now."""
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        nodes = (tuple(node_of_shard), tuple(node_of_router))
        return cls(created, model, TraceSpec.of(spec), placement, *nodes, dict(versions))


def encode_header(header: TraceHeader) -> bytes:
    """The header as it stands at the start of the file."""
    table = {**vars(header), "spec": asdict(header.spec), "placement": pack_placement(header.placement)}
    del table["version"]
    body = msgpack.packb(table)
    return msgpack.packb((MAGIC, header.version, zlib.crc32(body), body))


def decode_header(data: bytes, source: str) -> tuple[TraceHeader, int]:
    """The header at the start of a trace's bytes, and where the first record starts. Raises TraceError."""
    if not data:
        raise TraceError(f"{source}: is empty, expected a load trace")
    if data[: len(_START)] != _START[: len(data)]:
        raise TraceError(f"{source}: is no load trace (starts with {data[: len(_START)]!r}, expected {_START!r})")
    unpacker = make_unpacker(data)
    try:
        unpacker.read_array_header()
        unpacker.unpack()
        version = unpacker.unpack()
        if type(version) is not int or not 1 <= version <= VERSION:
            raise TraceError(f"{source}: is a trace of version {version}, this ep reads up to version {VERSION}")
        checksum, body = unpacker.unpack(), unpacker.unpack()
        if checksum != zlib.crc32(body):
            raise ValueError("its checksum is another")
        table = msgpack.unpackb(body, use_list=False)
        table["spec"] = TraceSpec(**table["spec"])
        table["placement"] = unpack_placement(table["placement"])
        header = TraceHeader(**table, version=version)
    except msgpack.OutOfData:
        raise TraceError(f"{source}: is cut off within its header, after {len(data)} bytes") from None
    except (KeyError, TypeError, ValueError, PlacementError, msgpack.UnpackException) as error:
        raise TraceError(f"{source}: the header is damaged: {error}") from error
    return header, unpacker.tell()


def make_unpacker(data: bytes) -> Any:
    """A msgpack.Unpacker over `data`, however much that is; lengths beyond its end are OutOfData, no error."""
    most = max(len(data), 2**31 - 1)
    limits = {f"max_{kind}_len": most for kind in ("str", "bin", "array", "map", "ext")}
    unpacker = msgpack.Unpacker(use_list=False, max_buffer_size=most, **limits)
    unpacker.feed(data)
    return unpacker

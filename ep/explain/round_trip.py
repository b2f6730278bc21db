"""One layer's round trip: tokens out, experts, partial sums back. Expectations with their origin, never measurements.

    transfer(T) = known us + (bytes(T) - bytes(known)) / bandwidth       bytes: T x copies x (row out + bf16 row back)
    experts(T)  = max(FLOPs / FLOP/s, bytes / read bandwidth)            bytes: the weights of the slots that are used
    round trip  = transfer + experts

copies is how many shards a token's experts lie on, drawn uniformly: S (1 - C(E - E/S, k) / C(E, k)).

Shape legend: T tokens of the router's step, S shards, E experts, k top-k, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ep.explain.figure import Figure, weakest
from ep.explain.hardware import Hardware, KnownRoundTrip
from ep.explain.layout import Layout
from ep.kernels.fused_moe import ExpertShape
from ep.kernels.roofline import Ceilings, Work, fused_moe_work
from ep.model import ModelSpec

SCALE_COLUMNS = 128
"""Columns of a row that share a scale when rows travel as FP8 (ep.wire)."""


@dataclass(frozen=True)
class RoundTrip:
    """us of a layer: transfer without compute, experts of the mean shard, and both.

    copies: shards that a token goes to. bytes_out, bytes_back: of all of the router's links. rows: (token, expert)
    pairs of a shard; used_slots: of its slots that have any.
    """

    num_tokens: int
    copies: float
    bytes_out: int
    bytes_back: int
    transfer: Figure
    rows: float
    used_slots: float
    experts: Figure
    total: Figure


def round_trip(spec: ModelSpec, hardware: Hardware, layout: Layout, num_tokens: int, dispatch_dtype: str) -> RoundTrip:
    """A step of num_tokens tokens, in one layer."""
    copies = shards_per_token(spec.num_experts, spec.top_k, layout.shards)
    out = round(num_tokens * copies * row_bytes(spec.hidden_size, dispatch_dtype))
    back = round(num_tokens * copies * row_bytes(spec.hidden_size, "bf16"))
    moved = _transfer(spec, hardware, layout, num_tokens, dispatch_dtype, out + back)
    rows = num_tokens * spec.top_k / layout.shards
    used = layout.experts_per_shard * (1 - (1 - spec.top_k / spec.num_experts) ** num_tokens)
    computed = _experts(spec, hardware, layout, rows, used, num_tokens * copies / layout.shards)
    total = Figure(
        moved.value + computed.value, weakest((moved.kind, computed.kind)), "transfer + experts of the mean shard"
    )
    return RoundTrip(num_tokens, copies, out, back, moved, rows, used, computed, total)


def shards_per_token(num_experts: int, top_k: int, shards: int) -> float:
    """How many shards hold one of a token's experts, which are drawn uniformly; shards hold contiguous blocks."""
    sizes = [num_experts // shards + (shard < num_experts % shards) for shard in range(shards)]
    every = math.comb(num_experts, top_k)
    return sum(1 - math.comb(num_experts - size, top_k) / every for size in sizes)


def row_bytes(hidden_size: int, dtype: str) -> int:
    """One token's row on the wire, FP8 with a float32 scale for every 128 columns."""
    return 2 * hidden_size if dtype == "bf16" else hidden_size + 4 * -(-hidden_size // SCALE_COLUMNS)


def ceilings(hardware: Hardware) -> Ceilings:
    return Ceilings(hardware.fp8_flops.value, hardware.bf16_flops.value, hardware.read_bytes_per_s.value)


def floor(hardware: Hardware, work: Work, quantized: bool, what: str) -> Figure:
    """What the work takes at least: an estimate of what it takes, from ceilings of whatever kind."""
    limits = ceilings(hardware)
    flops = limits.fp8_flops if quantized else limits.bf16_flops
    us = limits.floor_us(work, quantized)
    by_bytes = work.bytes / limits.read_bytes >= work.flops / flops
    if by_bytes:
        formula = f"{what}: {work.bytes / 1e6:,.1f} MB / {limits.read_bytes / 1e12:.2f} TB/s"
    else:
        formula = f"{what}: {work.flops / 1e9:,.1f} GFLOP / {flops / 1e12:,.0f} TFLOP/s"
    return Figure(us, "estimated", formula)


def _transfer(
    spec: ModelSpec, hardware: Hardware, layout: Layout, num_tokens: int, dispatch_dtype: str, num_bytes: int
) -> Figure:
    """Shards of other nodes and of the router's own answer at the same time: the slower part counts."""
    remote = (layout.nodes - 1) / layout.nodes
    parts = [_scaled(hardware.same_node, num_bytes * (1 - remote), "same node")]
    if layout.nodes > 1:
        parts.append(_scaled(hardware.between_nodes, num_bytes * remote, "between nodes"))
    slowest = max(parts, key=lambda figure: figure.value)
    known = hardware.between_nodes if layout.nodes > 1 and slowest is parts[-1] else hardware.same_node
    asked = (num_tokens, spec.hidden_size, layout.shards, layout.nodes, dispatch_dtype)
    same_sizes = asked == (known.num_tokens, known.hidden_size, known.shards, known.nodes, known.dispatch_dtype)
    same_choices = layout.shards == 1 or spec.top_k == known.top_k
    return known.us if same_sizes and same_choices else slowest


def _scaled(known: KnownRoundTrip, num_bytes: float, where: str) -> Figure:
    """Another number of bytes over the same links."""
    rows = known.num_tokens * shards_per_token(256, known.top_k, known.shards)
    known_bytes = rows * (row_bytes(known.hidden_size, known.dispatch_dtype) + row_bytes(known.hidden_size, "bf16"))
    known_bytes *= (known.nodes - 1) / known.nodes if known.nodes > 1 else 1
    start = max(0.0, known.us.value - 1e6 * known_bytes / known.bytes_per_s.value)
    us = start + 1e6 * num_bytes / known.bytes_per_s.value
    formula = (
        f"{where}: {start:.0f} µs + {num_bytes / 1e6:.2f} MB / {known.bytes_per_s.value / 1e9:.0f} GB/s, "
        f"scaled from {known.us.kind} {known.us.value:g} µs"
    )
    return Figure(us, "estimated", formula)


def _experts(
    spec: ModelSpec, hardware: Hardware, layout: Layout, rows: float, used_slots: float, num_tokens: float
) -> Figure:
    dtype = torch.bfloat16 if spec.quant_block is None else torch.float8_e4m3fn
    shape = ExpertShape(1, layout.slots_per_shard, spec.hidden_size, spec.moe_intermediate_size, dtype)
    whole = fused_moe_work(shape, 1, 1, 0)
    work = Work(
        flops=round(rows * whole.flops),
        bytes=round(used_slots * whole.bytes + num_tokens * fused_moe_work(shape, 0, 0, 1).bytes),
    )
    what = f"{used_slots:.1f} of {layout.experts_per_shard} experts, {rows:,.0f} rows"
    return floor(hardware, work, shape.quantized, what)


"""A step's expected time on the router: attention, gate, round trips, shared expert, dense layers, head.

A layer takes attention + gate + the longer of round trip and shared expert, which run at the same time. Every part is
the slower of its matrix products and of reading its weights (and KV cache) once, at the device's ceilings; launches,
norms, sampling and imbalance between shards are not counted.

Shape legend: T tokens of the step, C tokens of context read in all, P (query, key) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ep.explain.figure import Figure, weakest
from ep.explain.hardware import Hardware
from ep.explain.memory import KvCache
from ep.explain.parameters import Part, attention_matrices
from ep.explain.round_trip import RoundTrip, floor
from ep.kernels.roofline import Work
from ep.model import ModelSpec


@dataclass(frozen=True)
class Tokens:
    """count: T. context: C. pairs: P, causal. decode: one query a request, against the compressed KV cache of MLA."""

    count: int
    requests: int
    context: int
    pairs: int
    decode: bool


@dataclass(frozen=True)
class TimedPart:
    """us: of one layer (or of the step where layers is 1). overlapped: runs beside the round trip."""

    name: str
    layers: int
    us: Figure
    overlapped: bool = False

    @property
    def step_us(self) -> float:
        return self.layers * self.us.value


@dataclass(frozen=True)
class StepTime:
    """moe_layer_us, step_us: with what overlaps left out. tokens_per_s: of the one router."""

    tokens: Tokens
    what: str
    parts: tuple[TimedPart, ...]
    round_trip_us: Figure
    moe_layer_us: Figure
    step_us: Figure
    tokens_per_s: float


def decode_tokens(num_requests: int, context: int) -> Tokens:
    return Tokens(num_requests, num_requests, num_requests * context, num_requests * context, decode=True)


def prefill_tokens(count: int, input_len: int) -> Tokens:
    """A step of whole prompts, or of the chunk of one that lies in its middle."""
    requests = -(-count // input_len)
    position = max(1, input_len // 2)
    context = requests * input_len if count >= input_len else position
    return Tokens(count, requests, context, count * position, decode=False)


def step_time(
    what: str,
    spec: ModelSpec,
    parts: Sequence[Part],
    hardware: Hardware,
    kv: KvCache,
    tokens: Tokens,
    trip: RoundTrip,
) -> StepTime:
    """trip: of this many tokens. Every figure is an estimate, because each is a floor."""
    quantized = spec.quant_block is not None
    held = [part for part in parts if part.holder == "router"]
    matrices = attention_matrices(spec)

    def weights(*names: str) -> tuple[int, int]:
        chosen = [part for part in held if part.name in names]
        return sum(part.params_each for part in chosen), sum(part.bytes_each for part in chosen)

    def product(label: str, fp8: bool, *names: str) -> Figure:
        params, num_bytes = weights(*names)
        return floor(hardware, Work(2 * tokens.count * params, num_bytes), fp8, label)

    projections = product("projections", quantized, *matrices)
    core = floor(hardware, _core_work(spec, kv, tokens), False, "KV cache and scores")
    attention = Figure(projections.value + core.value, "estimated", f"{projections.source}; {core.source}")
    moe, dense = spec.num_moe_layers, spec.num_layers - spec.num_moe_layers
    timed = [
        TimedPart("attention", spec.num_layers, attention),
        TimedPart("gate", moe, product("gate", False, "gate")),
        TimedPart("dispatch and combine", moe, trip.transfer),
        TimedPart("experts", moe, trip.experts),
    ]
    if spec.num_shared_experts:
        timed.append(TimedPart("shared expert", moe, product("shared expert", quantized, "shared expert"), True))
    if dense:
        timed.append(TimedPart("dense MLP", dense, product("dense MLP", quantized, "dense MLP")))
    params, num_bytes = weights("head")
    timed.append(TimedPart("head", 1, floor(hardware, Work(2 * tokens.requests * params, num_bytes), False, "head")))
    by_name = {part.name: part.us.value for part in timed}
    beside = max(trip.total.value, by_name.get("shared expert", 0.0))
    kind = weakest(part.us.kind for part in timed)
    formula = "attention + gate + max(round trip, shared expert)"
    layer = Figure(by_name["attention"] + by_name["gate"] + beside, kind, formula)
    step = moe * layer.value + dense * (by_name["attention"] + by_name.get("dense MLP", 0.0)) + by_name["head"]
    formula = f"{moe} MoE layers" + (f" + {dense} dense layers" if dense else "") + " + head"
    rate = 1e6 * tokens.count / step
    return StepTime(tokens, what, tuple(timed), trip.total, layer, Figure(step, kind, formula), rate)


def _core_work(spec: ModelSpec, kv: KvCache, tokens: Tokens) -> Work:
    """Scores and weighted sums of one layer. In decode MLA works on the compressed values, in prefill on heads."""
    mla = spec.mla
    if mla is None:
        width = 2 * spec.head_dim
    elif tokens.decode:
        width = 2 * mla.kv_lora_rank + mla.qk_rope_head_dim
    else:
        width = spec.head_dim + mla.v_head_dim
    return Work(2 * spec.num_heads * width * tokens.pairs, tokens.context * kv.bytes_per_layer)

"""What a torch profile of a router on a GPU says of its decode steps: which kernels its stream spent a step on.

A step goes from the gate of its first MoE layer to the one of the next step; what the stream did nothing in is idle.
The router's stream is the one that gates: jobs of a shard in the same process run beside it and are not counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ep.bench.step_parts import LEAST_STEPS, StepParts, sum_up

GATE = "_route_kernel"
KINDS = {
    "gate": re.compile(f"^{GATE}$"),
    "dispatch": re.compile(r"^(begin|dispatch|_assign)_kernel$"),
    "experts here": re.compile(r"^(_quantize_tokens|_permute|_count|_start|grouped_gemm\w*|sum_choices)_kernel$"),
    "experts elsewhere": re.compile(r"^wait(_and_combine)?_kernel$"),
    "combine": re.compile(r"^combine_kernel$"),
    "attention": re.compile(r"attention|attn|flash|fmha|mla|reshape_and_cache|concat_and_cache", re.IGNORECASE),
    "products": re.compile(r"gemm|nvjet|cublas|cutlass|splitk|scaled_mm|(^|_)mm(_|$)", re.IGNORECASE),
}
"""By which names of kernels; the first that fits. The others are the rest of the model."""
REST, IDLE = "rest of the model", "idle"
GPU_PARTS = (*KINDS, REST, IDLE)


def has_kernels(events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether this profile is one of a GPU."""
    return any(_is_kernel(event) for event in events)


def split_gpu_steps(
    events: Sequence[Mapping[str, Any]], num_moe_layers: int, num_requests: int
) -> StepParts:
    """events: of a Chrome trace of decode steps, all of num_requests requests. Raises ValueError."""
    kernels = sorted((event for event in events if _is_kernel(event)), key=lambda event: float(event["ts"]))
    streams = {_stream(event) for event in kernels if event["name"] == GATE}
    if len(streams) != 1:
        raise ValueError(f"{GATE} runs on {len(streams)} streams of the profile, expected 1")
    ours = [event for event in kernels if _stream(event) in streams]
    gates = [place for place, event in enumerate(ours) if event["name"] == GATE]
    starts = gates[::num_moe_layers]
    if len(starts) <= LEAST_STEPS:
        raise ValueError(f"{len(gates)} gates of {num_moe_layers} MoE layers, expected more than {LEAST_STEPS} steps")
    rows = [_parts(ours[start:end], float(ours[end]["ts"])) for start, end in pairwise(starts)]
    return sum_up(rows, num_requests)


def _parts(kernels: Sequence[Mapping[str, Any]], end: float) -> dict[str, float]:
    """Microseconds of one step. Of kernels that overlap, the later one has only what is left."""
    spent = dict.fromkeys(GPU_PARTS, 0.0)
    now = float(kernels[0]["ts"])
    for kernel in kernels:
        start, stop = float(kernel["ts"]), min(float(kernel["ts"]) + float(kernel["dur"]), end)
        spent[IDLE] += max(0.0, start - now)
        spent[kind_of(str(kernel["name"]))] += max(0.0, stop - max(start, now))
        now = max(now, stop)
    spent[IDLE] += max(0.0, end - now)
    return spent


def kind_of(name: str) -> str:
    """Which of GPU_PARTS a kernel of this name is a part of, but for IDLE."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), REST)


def _is_kernel(event: Mapping[str, Any]) -> bool:
    return event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")


def _stream(event: Mapping[str, Any]) -> Any:
    return event.get("args", {}).get("stream", event.get("tid"))

"""What a torch profile of a router says of its decode steps: how long each part of a step took.

    |<------------------------------ from one step's start to the next one's ------------------------------>|
    |<--------------------------- the step in the router ----------------------->|
     .. attention .. gate dispatch (shared) [experts + combine] .. attention .. ..   sampling, scheduler, API server

Parts are top-level ops of the step, the gate by where it stands: from the last matrix product before a layer's first
top-k to the end of its last top-k. Of `ep::combine` the router's own mark says how much the shards computed.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ep.bench.profile_gpu import has_kernels, split_gpu_steps
from ep.bench.step_parts import LEAST_STEPS, StepParts, sum_up
from ep.errors import EpError
from ep.profile_marks import EXPERTS

PARTS = ("attention", "gate", "dispatch", "experts", "combine", "rest of the model", "between steps")
_STEP = re.compile(r"^execute_.*context_0\(0\)_generation_(\d+)\(\1\)")
_ATTENTION = re.compile(r"^vllm::unified_.*(attention|kv_cache_update)")
_PRODUCT = re.compile(r"linear|gemm|(::|_)(mm|addmm|matmul)$")
_TOPK, _DISPATCH, _COMBINE = "aten::topk", "ep::dispatch", "ep::combine"


def read_profile(path: Path, num_moe_layers: int) -> StepParts:
    """From a Chrome trace (.json or .json.gz) of a router: steps that decode as many requests as most of its steps do.

    Raises EpError where it lacks what the parts are told by.
    """
    data = path.read_bytes()
    trace = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    try:
        events = trace["traceEvents"]
        num_requests = count_requests(events)
        if has_kernels(events):
            return split_gpu_steps(events, num_moe_layers, num_requests)
        return split_steps(events, num_requests)
    except ValueError as error:
        raise EpError(f"{path}: {error}") from error


def count_requests(events: Sequence[Mapping[str, Any]]) -> int:
    """That most of the decode steps are of. Raises ValueError where there is none."""
    steps = Counter(found.group(1) for event in events if (found := _STEP.match(str(event.get("name")))) is not None)
    if not steps:
        raise ValueError("no decode step in the profile")
    return int(steps.most_common(1)[0][0])


def split_steps(events: Sequence[Mapping[str, Any]], num_requests: int) -> StepParts:
    """events: of a Chrome trace. Raises ValueError."""
    complete = sorted((e for e in events if e.get("ph") == "X"), key=lambda e: (e["ts"], -e["dur"]))
    steps = [e for e in complete if e["name"].startswith("execute_")]
    pairs = [(step, following) for step, following in pairwise(steps) if _decodes(step["name"], num_requests)]
    if len(pairs) < LEAST_STEPS:
        raise ValueError(f"{len(pairs)} decode steps of {num_requests} requests, expected at least {LEAST_STEPS}")
    rows = []
    for step, following in pairs:
        end = step["ts"] + step["dur"]
        inside = [e for e in complete if e["tid"] == step["tid"] and step["ts"] <= e["ts"] < end and e is not step]
        rows.append(_parts(inside, step["dur"], following["ts"] - step["ts"]))
    return sum_up(rows, num_requests)


def _decodes(name: str, num_requests: int) -> bool:
    found = _STEP.match(name)
    return found is not None and int(found.group(1)) == num_requests


def _parts(events: Sequence[Mapping[str, Any]], step_us: float, period_us: float) -> dict[str, float]:
    """Microseconds of one step."""
    spent = dict.fromkeys(PARTS, 0.0)
    product: Mapping[str, Any] | None = None
    gate_start = gate_end = 0.0
    for event in events:
        name, start, length = str(event["name"]), float(event["ts"]), float(event["dur"])
        if _ATTENTION.match(name):
            spent["attention"] += length
        elif name == _TOPK:
            if product is None:
                raise ValueError("a step's profile shows no matrix product before the first top-k")
            if not gate_end:
                gate_start = float(product["ts"])
            gate_end = start + length
        elif name == _DISPATCH:
            spent["dispatch"] += length
            spent["gate"] += gate_end - gate_start
            gate_start = gate_end = 0.0
        elif name == _COMBINE:
            spent["combine"] += length
        elif name.startswith(EXPERTS):
            spent["experts"] += int(name.removeprefix(EXPERTS)) / 1e3
        elif _PRODUCT.search(name) and not gate_end:
            product = event
    missing = [name for name in ("attention", "dispatch", "gate", "experts", "combine") if not spent[name]]
    if missing:
        raise ValueError(f"a step's profile shows no {missing[0]}")
    spent["combine"] -= spent["experts"]
    spent["rest of the model"] = step_us - sum(spent.values())
    spent["between steps"] = period_us - step_us
    return spent

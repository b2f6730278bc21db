"""The parts of a decode step: from a torch profile whose times are known, and from one of a real router."""

from __future__ import annotations

import gzip
import json
import random
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ep.bench.profile import PARTS, read_profile, split_steps
from ep.bench.profile_gpu import GATE, GPU_PARTS, REST, kind_of, split_gpu_steps
from ep.bench.step_parts import join
from ep.errors import EpError
from ep.placement import even_split
from ep.profile_marks import EXPERTS
from tests.unit.shards import NUM_LAYERS, make_spec, random_routing
from tests.unit.test_router import make_rig

US = st.integers(1, 1000)
NAMES = ("attention", "gate", "dispatch", "wait", "product", "between")


class Trace:
    """Events one after the other, on one thread."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[dict[str, Any]] = []

    def add(self, name: str, length: float, inside: str | None = None) -> None:
        self.events.append({"ph": "X", "tid": 7, "name": name, "ts": self.now, "dur": length})
        if inside is not None:
            self.events.append({"ph": "X", "tid": 7, "name": inside, "ts": self.now + length, "dur": 0.0})
        self.now += length


LINEAR = "_C::weight_packed_linear"
PRODUCT = st.sampled_from([LINEAR, "_C::onednn_mm", "aten::mm", "aten::addmm", "aten::linear"])


def step(trace: Trace, us: dict[str, int], num_layers: int, num_requests: int, product: str = LINEAR) -> None:
    """As a router's profile has it: a dense layer, then MoE layers whose gate is a product and two top-k."""
    start, at = trace.now, len(trace.events)
    trace.add(product, us["product"])
    trace.add("vllm::unified_mla_kv_cache_update", us["attention"])
    trace.add("vllm::unified_mla_attention_with_output", us["attention"])
    for _ in range(num_layers):
        trace.add(product, us["product"])
        for name in (product, "aten::topk", "aten::topk"):
            trace.add(name, us["gate"])
        trace.add(product, us["product"])
        trace.add("ep::dispatch", us["dispatch"])
        trace.add("ep::combine", 3 * us["wait"], f"{EXPERTS}{2 * us['wait'] * 1000}")
    trace.add("aten::argmax", us["product"])
    name = f"execute_context_0(0)_generation_{num_requests}({num_requests})"
    trace.events.insert(at, {"ph": "X", "tid": 7, "name": name, "ts": start, "dur": trace.now - start})
    trace.events.append({"ph": "X", "tid": 8, "name": "ep::dispatch", "ts": start, "dur": 5.0})  # another thread's
    trace.now += us["between"]


@given(
    st.fixed_dictionaries(dict.fromkeys(NAMES, US)), st.integers(1, 3), st.integers(1, 99), st.integers(4, 9), PRODUCT
)
def test_the_parts_are_those_of_a_known_trace(
    us: dict[str, int], layers: int, batch: int, num_steps: int, product: str
) -> None:
    trace = Trace()
    step(trace, {name: 7 * us[name] for name in NAMES}, layers, batch + 1)  # of another batch: left out
    for _ in range(num_steps):
        step(trace, us, layers, batch, product)
    found = split_steps(trace.events, batch)
    assert found.num_steps == num_steps - 1 and list(found.parts_ms) == list(PARTS)
    assert found.period_ms == pytest.approx(sum(found.parts_ms.values()))
    expected = {
        "attention": 2 * us["attention"],
        "gate": 3 * us["gate"] * layers,
        "dispatch": us["dispatch"] * layers,
        "experts": 2 * us["wait"] * layers,
        "combine": us["wait"] * layers,
        "rest of the model": us["product"] * (2 + 2 * layers),
        "between steps": us["between"],
    }
    assert found.parts_ms == pytest.approx({name: value / 1e3 for name, value in expected.items()})


def test_routers_that_share_a_batch(tmp_path: Path) -> None:
    """Not evenly: who has how many requests is in their profiles."""
    found = []
    for router, batch in enumerate((4, 3)):
        trace = Trace()
        step(trace, dict.fromkeys(NAMES, 9), 2, batch + 1)
        for _ in range(5):
            step(trace, dict.fromkeys(NAMES, 10 * (router + 1)), 2, batch)
        path = tmp_path / f"router{router}.json.gz"
        path.write_bytes(gzip.compress(json.dumps({"traceEvents": trace.events}).encode()))
        found.append(read_profile(path, 2))
    assert [one.num_requests for one in found] == [4, 3]
    both = join(found)
    assert both.num_requests == 7 and both.period_ms == pytest.approx(sum(both.parts_ms.values()))
    assert both.parts_ms["dispatch"] == pytest.approx(2 * 15 / 1e3)
    (tmp_path / "other.json").write_text(json.dumps({"traceEvents": []}))
    with pytest.raises(EpError, match=r"other\.json: no decode step"):
        read_profile(tmp_path / "other.json", 2)


@pytest.mark.parametrize("missing", ["attention", "gate", "dispatch", "experts"])
def test_a_profile_that_lacks_a_part_is_no_zero(missing: str) -> None:
    names = {"attention": "vllm::unified_", "gate": "aten::topk", "dispatch": "ep::dispatch", "experts": EXPERTS}
    trace = Trace()
    for _ in range(4):
        step(trace, dict.fromkeys(NAMES, 5), 1, 2)
    events = [event for event in trace.events if not event["name"].startswith(names[missing])]
    with pytest.raises(ValueError, match=f"no {missing}"):
        split_steps(events, 2)
    with pytest.raises(ValueError, match="0 decode steps of 3 requests"):
        split_steps(trace.events, 3)


def test_a_product_of_an_unknown_name_is_told() -> None:
    trace = Trace()
    for _ in range(4):
        step(trace, dict.fromkeys(NAMES, 5), 1, 2, "_C::unheard_of")
    with pytest.raises(ValueError, match="no matrix product"):
        split_steps(trace.events, 2)


def test_a_router_marks_the_experts_in_a_profile_only(tmp_path: Any) -> None:
    rig = make_rig("shm", even_split(NUM_LAYERS, make_spec().num_experts, 2), tmp_path)
    hidden, ids, weights = random_routing(rig.spec, 4)
    hidden = hidden.bfloat16()
    try:
        rig.router.moe(0, hidden, ids, weights)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(3):
                with torch.profiler.record_function("layer"):
                    rig.router.moe(0, hidden, ids, weights)
    finally:
        rig.close()
    layers = [event.cpu_time_total for event in profile.events() if event.name == "layer"]
    marks = [event.name for event in profile.events() if event.name.startswith(EXPERTS)]
    assert len(marks) == 3
    assert all(0 < int(mark.removeprefix(EXPERTS)) <= 1e3 * layer for mark, layer in zip(marks, layers, strict=True))


KERNELS = {
    GATE: "gate",
    "dispatch_kernel": "dispatch",
    "wait_kernel": "experts elsewhere",
    "grouped_gemm_hopper_kernel": "experts here",
    "_permute_kernel": "experts here",
    "combine_kernel": "combine",
    "flash_fwd_splitkv_mla_kernel": "attention",
    "void cutlass::device_kernel<GemmUniversal>": "products",
    "triton_red_fused_rms_norm_0": "rest of the model",
    "Memcpy DtoD (Device -> Device)": "rest of the model",
}


def test_every_kernel_of_a_routers_stream_has_its_part() -> None:
    """take, collect and return run on a shard's stream only."""
    sources = (Path(__file__).parents[2] / "kernels").glob("*.py")
    ours = {name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)}
    assert {name for name in ours if kind_of(name) == REST} == {"take_kernel", "collect_kernel", "return_kernel"}


@given(
    steps=st.lists(st.lists(st.tuples(st.sampled_from(sorted(set(KERNELS) - {GATE})), st.integers(1, 50),
                                      st.integers(-5, 30)), max_size=6), min_size=8, max_size=12),
    num_layers=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_kernels_of_a_step_add_up_to_it(
    steps: list[list[tuple[str, int, int]]], num_layers: int, seed: int
) -> None:
    """Steps are made of layers with a gate first; kernels may begin before the one before has ended."""
    events: list[dict] = []
    now, starts = 0.0, []

    def add(name: str, length: float, gap: float, stream: int = 7) -> None:
        nonlocal now
        start = now + gap
        event = {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": length, "args": {"stream": stream}}
        events.append(event)
        now = max(now, start + length)

    for step in steps:
        starts.append(now)
        for layer in range(num_layers):
            add(GATE, 3, 0)
            for name, length, gap in step if layer == 0 else step[:2]:
                add(name, length, max(gap, -3))
    add(GATE, 3, 0)
    shuffled = random.Random(seed).sample(events, len(events))
    elsewhere = [event | {"args": {"stream": 9}} for event in events if event["name"] != GATE]
    found = split_gpu_steps([*shuffled, *elsewhere, {"ph": "X", "cat": "cpu_op", "name": GATE}], num_layers, 4)
    assert tuple(found.parts_ms) == GPU_PARTS and min(found.parts_ms.values()) >= 0
    assert found.num_steps == len(steps)
    periods = sorted((end - start) / 1e3 for start, end in zip(starts, [*starts[1:], now - 3]))
    cut = len(periods) // 4
    assert found.period_ms == pytest.approx(statistics.fmean(periods[cut : len(periods) - cut]))
    kinds = {KERNELS[event["name"]] for event in events} | {"idle"}
    assert all(found.parts_ms[kind] == 0 for kind in set(GPU_PARTS) - kinds)


def test_what_is_no_profile_of_a_gpu_router() -> None:
    kernel = {"ph": "X", "cat": "kernel", "name": GATE, "ts": 0.0, "dur": 1.0, "args": {"stream": 7}}
    with pytest.raises(ValueError, match="runs on 0 streams"):
        split_gpu_steps([kernel | {"name": "dispatch_kernel"}], 1, 4)
    with pytest.raises(ValueError, match="2 gates of 1 MoE layers"):
        split_gpu_steps([kernel, kernel], 1, 4)

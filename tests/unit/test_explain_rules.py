"""The arithmetic behind `ep explain`, held beside slow and independent ways to the same numbers."""

from __future__ import annotations

import io
import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from ep.errors import OptionError, PlacementError
from ep.explain.context import context_length
from ep.explain.current_rule import BatchDefaults, batch_defaults, capture_sizes, current_rule, dispatch, schedule
from ep.explain.document import document
from ep.explain.explanation import Question, explain
from ep.explain.hardware import list_hardware, load_hardware
from ep.explain.layout import plan_layout
from ep.explain.memory import BLOCK_TOKENS, MEMORY_SHARE, kv_cache, router_memory
from ep.explain.older_rule import older_rule
from ep.explain.page import show
from ep.explain.parameters import model_parts
from ep.explain.round_trip import row_bytes, shards_per_token
from ep.explain.steps import Batch
from ep.explain.words import sizes_list, span
from ep.presets import list_presets, load_preset
from ep.serve_options import ServeOptions, default_shards, first_placement
from ep.transport.handshake import MAX_TOKENS
from ep.wire import dispatch_layout

batches = st.builds(Batch, st.integers(1, 300), st.integers(1, 3000), st.integers(1, 40))


@given(
    batch=batches,
    captured_len=st.integers(1, 5000) | st.none(),
    mla=st.booleans(),
    amd=st.booleans(),
    max_running=st.integers(0, 400),
)
def test_older_steps_are_what_vllm_decides_step_by_step(
    batch: Batch, captured_len: int | None, mla: bool, amd: bool, max_running: int
) -> None:
    rule = older_rule(batch, 65536, mla, amd, max_running, captured_len)
    running = max(1, min(batch.num_requests, 256, max_running))
    assert rule.running == running
    longest = batch.total_len if captured_len is None else captured_len
    captured: dict[int, bool] = {}
    for step in rule.steps:
        if step.phase == "decode":
            assert step.positions is not None and step.count == step.positions[1] - step.positions[0] + 1
            captured |= dict.fromkeys(range(step.positions[0], step.positions[1] + 1), step.captured)
            padded = running if running <= 2 else 4 if running <= 4 else (running + 7) // 8 * 8
            assert step.padded == (padded if step.captured else None)
    # _use_captured_graph: decode_only, not enforce_eager, batch and length within; the answer's last token is not fed.
    wanted = {length: length <= longest for length in range(batch.input_len + 1, batch.total_len)}
    assert captured == wanted
    (prefill,) = [step for step in rule.steps if step.phase == "prefill"]
    assert not prefill.captured
    total = running * batch.input_len
    assert prefill.tokens[0] + (prefill.count - 1) * prefill.tokens[1] == total
    assert prefill.tokens[1] <= rule.chunked_prefill.budget
    assert rule.chunked_prefill.enabled == (not mla and not amd)


def scheduled_one_by_one(batch: Batch, budget: int) -> list[tuple[int, int]]:
    """(decode tokens, prefill tokens) of every step, request by request in order of arrival."""
    prompt = [batch.input_len] * batch.num_requests
    answered = [0] * batch.num_requests
    steps = []
    while any(done < batch.output_len for done in answered):
        left, decode, prefill = budget, 0, 0
        for request in range(batch.num_requests):
            if answered[request] == batch.output_len or not left:
                continue
            if prompt[request] == 0:
                decode, left = decode + 1, left - 1
                answered[request] += 1
            else:
                taken = min(prompt[request], left)
                prompt[request] -= taken
                prefill, left = prefill + taken, left - taken
                answered[request] += prompt[request] == 0
        steps.append((decode, prefill))
    return steps


@settings(deadline=None, max_examples=60)
@given(
    batch=st.builds(Batch, st.integers(1, 40), st.integers(1, 150), st.integers(1, 12)), budget=st.integers(40, 400)
)
def test_the_schedule_is_that_of_a_queue(batch: Batch, budget: int) -> None:
    steps = [
        (step.decode_tokens, step.prefill_tokens) for step in schedule(batch, budget) for _ in range(step.count)
    ]
    assert steps == scheduled_one_by_one(batch, budget)


@given(batch=batches, max_running=st.integers(0, 400))
def test_current_steps_use_the_smallest_graph_that_fits(batch: Batch, max_running: int) -> None:
    rule = current_rule(batch, 65536, 192 * 2**30, max_running)
    assert rule.running == max(1, min(batch.num_requests, max_running))
    assert len(rule.steps) <= 8
    steps = [step for step in rule.steps if step.phase != "decode"]
    assert sum(step.count for step in steps) >= rule.running * batch.input_len / rule.chunked_prefill.budget
    for step in rule.steps:
        assert step.captured == (step.tokens[1] <= 512) == (step.graph != "eager")
        assert step.count >= 1 and step.tokens[0] <= step.tokens[1]
        assert (step.graph == "full") <= (step.phase == "decode")
        if step.padded is not None and step.phase == "decode":
            assert step.padded == min(size for size in rule.capture_sizes if size >= step.tokens[1])


@given(tokens=st.integers(1, 2000), seqs=st.integers(1, 1200), decode_only=st.booleans())
def test_a_full_graph_never_holds_more_requests_than_may_run(tokens: int, seqs: int, decode_only: bool) -> None:
    sizes = capture_sizes(BatchDefaults(max(seqs, 2048), seqs))
    assert list(sizes) == sorted(set(sizes)) and sizes[0] == 1
    graph, padded = dispatch(tokens, decode_only, sizes, seqs)
    assert (graph == "eager") == (padded is None) == (tokens > sizes[-1])
    if graph == "full":
        assert decode_only and padded is not None and tokens <= padded <= seqs


def test_defaults_go_by_the_devices_memory() -> None:
    found = {key: batch_defaults(load_hardware(key).memory_bytes.value, 163840) for key in list_hardware()}
    assert found["mi300x"] == found["mi308x"] == BatchDefaults(16384, 1024)
    assert found["h200"] == BatchDefaults(8192, 1024)


@given(num_experts=st.integers(2, 10), top_k=st.integers(1, 4), shards=st.integers(1, 10))
def test_shards_of_a_token_are_counted_over_all_choices(num_experts: int, top_k: int, shards: int) -> None:
    top_k, shards = min(top_k, num_experts), min(shards, num_experts)
    blocks = [len(block) for block in _split(num_experts, shards)]
    shard_of = [shard for shard, size in enumerate(blocks) for _ in range(size)]
    choices = list(itertools.combinations(range(num_experts), top_k))
    mean = sum(len({shard_of[expert] for expert in choice}) for choice in choices) / len(choices)
    assert shards_per_token(num_experts, top_k, shards) == pytest.approx(mean)


def _split(count: int, parts: int) -> list[range]:
    ends = [math.ceil(count * part / parts) for part in range(parts + 1)]
    sizes = sorted((end - start for start, end in itertools.pairwise(ends)), reverse=True)
    return [range(size) for size in sizes]


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_rows_are_those_of_the_wire(dtype: str) -> None:
    one, two = (dispatch_layout(tokens, 0, 7168, dtype) for tokens in (64, 128))
    ids = 4 * 64  # an expert count for every row
    assert two.total - one.total - ids == 64 * row_bytes(7168, dtype)


@settings(deadline=None, max_examples=25)
@given(
    shards=st.sampled_from([1, 2, 3, 5, 8]),
    redundant=st.integers(0, 6),
    spare=st.none() | st.integers(0, 3),
)
def test_slots_are_those_that_ep_serve_makes(shards: int, redundant: int, spare: int | None) -> None:
    spec = load_preset("mixtral-8x7b").spec
    options = ServeOptions("mixtral-8x7b", redundant=redundant, spare_slots=spare)
    try:
        slots = first_placement(spec, shards, options).slots_per_shard
    except PlacementError:
        with pytest.raises(PlacementError):
            plan_layout(spec, 1, 8, shards, redundant, spare)
        return
    assert plan_layout(spec, 1, 8, shards, redundant, spare).slots_per_shard == slots


@given(nodes=st.integers(1, 8), shards=st.integers(1, 64))
def test_a_layout_says_when_gpus_are_too_few(nodes: int, shards: int) -> None:
    spec = load_preset("deepseek-v3").spec
    layout = plan_layout(spec, nodes, 8, shards)
    assert (layout.beside_router > 0) == (shards + 1 > 8 * nodes) == ("too few" in layout.why)
    most = default_shards(spec.num_experts, 8 * nodes)
    assert most <= 8 * nodes < 2 * most and plan_layout(spec, nodes, 8, most).beside_router <= 1


@given(
    preset=st.sampled_from(list_presets()),
    dtype=st.sampled_from(["auto", "bf16", "fp8"]),
    tokens=st.integers(1, 30000),
    shard=st.integers(0, 150),
)
def test_the_kv_cache_fills_what_is_left(preset: str, dtype: str, tokens: int, shard: int) -> None:
    spec = load_preset(preset).spec
    device, kv = 200 * 10**9, kv_cache(spec, dtype)
    memory = router_memory(
        spec,
        model_parts(spec),
        kv,
        device_bytes=device,
        shard_bytes=shard * 10**9,
        budget=8192,
        max_num_seqs=256,
        request_tokens=tokens,
        max_model_len=32768,
    )
    used = memory.weights + memory.absorbed + memory.activations + memory.kv_bytes
    assert memory.kv_bytes % (kv.bytes_per_token * BLOCK_TOKENS) == 0
    if memory.kv_bytes:
        assert used + memory.shards <= device * MEMORY_SHARE
        assert device * memory.share - used < kv.bytes_per_token * BLOCK_TOKENS
        assert memory.requests * -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS <= memory.kv_tokens
    assert memory.fits == (memory.kv_tokens >= 32768)


@pytest.mark.parametrize(("preset", "tokens"), [("mixtral-8x7b", 32768), ("mixtral-8x22b", 65536)])
def test_max_model_len_is_the_configs(preset: str, tokens: int) -> None:
    found = context_length(load_preset(preset).config)
    assert (found.tokens, found.key) == (tokens, "max_position_embeddings")
    assert context_length(load_preset(preset).config, 4096).tokens == 4096
    with pytest.raises(OptionError, match=f"--max-model-len {tokens + 1}: expected at most {tokens}"):
        context_length(load_preset(preset).config, tokens + 1)


def test_scaling_that_max_position_embeddings_does_not_count() -> None:
    config = {"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    found = context_length(config)
    assert found.tokens == 16384 and "4,096 x 4" in found.why


def test_a_shards_messages_are_as_large_as_the_transports() -> None:
    from ep.explain.memory import MESSAGE_TOKENS

    assert MESSAGE_TOKENS == MAX_TOKENS


@settings(deadline=None, max_examples=20)
@given(
    preset=st.sampled_from(list_presets()),
    device=st.sampled_from(list_hardware()),
    batch=st.builds(Batch, st.integers(1, 5000), st.integers(1, 30000), st.integers(1, 2768)),
    shards=st.none() | st.integers(1, 8),
    nodes=st.integers(1, 4),
    dispatch_dtype=st.sampled_from(["bf16", "fp8"]),
)
def test_every_question_has_an_answer(
    preset: str, device: str, batch: Batch, shards: int | None, nodes: int, dispatch_dtype: str
) -> None:
    found = load_preset(preset)
    question = Question(preset, batch, shards, nodes, dispatch_dtype=dispatch_dtype)
    answer = explain(question, found.spec, found.config, load_hardware(device))
    json.dumps(document(answer, {}, None), allow_nan=False)
    out = io.StringIO()
    show(answer, {}, "test", None, Console(file=out, width=80))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    decoded = sum(step.count * step.tokens[0] for step in answer.older.steps if step.phase == "decode")
    assert decoded == answer.older.running * (batch.output_len - 1)
    assert 1 <= answer.round_trip.copies <= answer.layout.shards
    assert answer.round_trip.used_slots <= answer.layout.experts_per_shard
    assert answer.shard.fits == (answer.fewest_shards == answer.layout.shards)
    assert answer.decode.step_us.value > answer.decode.moe_layer_us.value > answer.round_trip.total.value


def test_words() -> None:
    assert sizes_list((1, 2, 4, *range(8, 257, 8))) == "1, 2, 4, 8, 16 .. 256 (every 8)"
    assert sizes_list((1, 2, 4)) == "1, 2, 4"
    assert span((8193, 8194)) == "8,193..8,194" and span((7, 7)) == "7"

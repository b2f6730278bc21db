"""Our schedulers around vLLM's: whatever steps fail, every request gets each of its tokens once."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from ep.cluster.scheduler import AsyncRouterScheduler, RouterScheduler
from ep.engine.failed_step import FailedStep
from ep.presets import load_preset
from ep.synthetic import cached_checkpoint

BLOCK, FIRST, GARBAGE = 16, 1000, 7
"""Tokens of a block of the KV cache; the first token of answers; what a step yields that builds upon a failed one."""
MAX_STEPS = 2000


def make_scheduler(is_async: bool, num_blocks: int, budget: int) -> Any:
    folder = str(cached_checkpoint(load_preset("mixtral-8x7b")))
    model = ModelConfig(model=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=512)
    scheduling = SchedulerConfig(
        max_num_seqs=8, max_num_batched_tokens=budget, max_model_len=512, enable_chunked_prefill=True,
        async_scheduling=is_async, is_encoder_decoder=False,
    )  # fmt: skip
    cache = CacheConfig(block_size=BLOCK, gpu_memory_utilization=0.5, enable_prefix_caching=False)
    config = VllmConfig(model_config=model, scheduler_config=scheduling, cache_config=cache)
    cache.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    kv_cache = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    kind: type[Scheduler] = AsyncRouterScheduler if is_async else RouterScheduler
    return kind(config, kv_cache, StructuredOutputManager(config), BLOCK)


@dataclass
class Step:
    """One that is under way. tokens: what each request gets, by the position that it has reached; nothing in the middle
    of a prompt. spoilt: requests of which an earlier step failed when this one was under way already."""

    output: Any
    tokens: dict[str, list[int]]
    spoilt: set[str]

    @classmethod
    def of(cls, scheduler: Any, output: Any) -> Step:
        tokens = {}
        for request_id in output.num_scheduled_tokens:
            request = scheduler.requests[request_id]
            place = request.num_computed_tokens - request.num_prompt_tokens
            tokens[request_id] = [] if request.is_prefill_chunk else [FIRST + place]
        return cls(output, tokens, set())

    def result(self) -> ModelRunnerOutput:
        ids = list(self.tokens)
        sampled = [[GARBAGE] * len(self.tokens[one]) if one in self.spoilt else self.tokens[one] for one in ids]
        return ModelRunnerOutput(
            req_ids=ids, req_id_to_index={one: at for at, one in enumerate(ids)}, sampled_token_ids=sampled,
            logprobs=None, prompt_logprobs_dict={}, pooler_output=[],
        )  # fmt: skip


@pytest.mark.parametrize("is_async", [False, True])
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 12)), min_size=1, max_size=6),
    num_blocks=st.integers(9, 40), budget=st.integers(16, 120), fails=st.lists(st.booleans(), max_size=40),
)  # fmt: skip
def test_every_token_comes_once_whatever_steps_fail(
    is_async: bool, sizes: list[tuple[int, int]], num_blocks: int, budget: int, fails: list[bool]
) -> None:
    scheduler = make_scheduler(is_async, num_blocks, budget)
    answers: dict[str, list[int]] = {}
    for number, (prompt, length) in enumerate(sizes):
        params = SamplingParams(max_tokens=length, ignore_eos=True)
        scheduler.add_request(Request(str(number), list(range(prompt)), params, None))
        answers[str(number)] = []
    under_way: deque[Step] = deque()
    outcomes = deque(fails)
    for _ in range(MAX_STEPS):
        if not scheduler.has_requests() and not under_way:
            break
        if scheduler.has_requests():
            step = Step.of(scheduler, scheduler.schedule())
            if step.tokens:
                under_way.append(step)
        if len(under_way) > int(is_async) or (under_way and not step.tokens):
            done = under_way.popleft()
            has_failed = outcomes.popleft() if outcomes else False
            if has_failed:
                for later in under_way:
                    later.spoilt |= done.tokens.keys() - done.spoilt
            result = FailedStep("a shard was lost", again=True) if has_failed else done.result()
            for outputs in scheduler.update_from_output(done.output, result).values():
                for output in outputs.outputs:
                    answers[output.request_id] += output.new_token_ids
    expected = {str(number): list(range(FIRST, FIRST + length)) for number, (_, length) in enumerate(sizes)}
    assert answers == expected

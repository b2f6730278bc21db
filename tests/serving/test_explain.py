"""`ep explain` beside vLLM's own code and transformers' own models; no server, no weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ep.explain.context import context_length
from ep.explain.current_rule import BatchDefaults, batch_defaults, capture_sizes, dispatch, schedule
from ep.explain.hardware import load_hardware
from ep.explain.memory import BLOCK_TOKENS, MEMORY_SHARE, kv_cache
from ep.explain.parameters import model_parts
from ep.explain.steps import Batch
from ep.explain.tuned import tuned_files
from ep.presets import list_presets, load_preset
from tests.cases import small_checkpoint


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """vLLM's configs set variables for its workers; servers of later tests shall not inherit them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("name", list_presets())
def test_parameters_are_those_of_transformers_own_model(name: str) -> None:
    """On the meta device, at the published dims: every tensor's size, and their sum."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig

    preset = load_preset(name)
    config = {key: value for key, value in preset.config.items() if key != "quantization_config"}
    kind = DeepseekV3Config if preset.spec.family == "deepseek_v3" else MixtralConfig
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind(**config))
    theirs = {name: tensor.numel() for name, tensor in model.named_parameters()}
    theirs |= {name: tensor.numel() for name, tensor in model.named_buffers() if name.endswith("correction_bias")}
    parts = [part for part in model_parts(preset.spec) if part.holder != "nobody"]
    assert sum(part.params for part in parts) == sum(theirs.values())
    for part in parts:
        if part.name in ("routed experts", "gate", "norms"):
            continue  # named or stacked in another way there
        for name, shape, _ in part.names():
            assert name.endswith("_scale_inv") or theirs[name] == math.prod(shape), name


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_kv_cache_is_that_of_vllms_specs(dtype: str) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    torch_dtype = {"auto": torch.bfloat16, "fp8": torch.uint8}[dtype]
    mla = load_preset("deepseek-v3").spec
    theirs = MLAAttentionSpec(
        block_size=BLOCK_TOKENS,
        num_kv_heads=1,
        head_size=mla.mla.kv_lora_rank + mla.mla.qk_rope_head_dim if mla.mla else 0,
        dtype=torch_dtype,
    )
    assert kv_cache(mla, dtype).bytes_per_layer * BLOCK_TOKENS == theirs.page_size_bytes
    gqa = load_preset("mixtral-8x22b").spec
    theirs = FullAttentionSpec(
        block_size=BLOCK_TOKENS, num_kv_heads=gqa.num_kv_heads, head_size=gqa.head_dim, dtype=torch_dtype
    )
    assert kv_cache(gqa, dtype).bytes_per_layer * BLOCK_TOKENS == theirs.page_size_bytes


def test_defaults_are_vllms() -> None:
    from vllm.config import CacheConfig

    assert CacheConfig.DEFAULT_BLOCK_SIZE == BLOCK_TOKENS
    assert CacheConfig().gpu_memory_utilization == MEMORY_SHARE


@pytest.mark.parametrize(("gib", "name"), [(192, "AMD Instinct MI300X"), (140, "NVIDIA H200"), (24, "NVIDIA L4")])
def test_batch_defaults_are_vllms(gib: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine import arg_utils
    from vllm.usage.usage_lib import UsageContext

    platform = SimpleNamespace(
        get_device_total_memory=lambda: gib << 30,
        get_device_name=lambda: name,
        is_tpu=lambda: False,
        is_cpu=lambda: False,
    )
    monkeypatch.setattr(arg_utils, "current_platform", platform)
    tokens, seqs = arg_utils.EngineArgs.get_batch_defaults(world_size=1)
    server = UsageContext.OPENAI_API_SERVER
    assert batch_defaults(gib << 30, 65536) == BatchDefaults(tokens[server], seqs[server])


def vllm_graphs(defaults: BatchDefaults) -> Any:
    """What `VllmConfig._set_cudagraph_sizes` reads and writes, with the defaults of a GPU."""
    from vllm.config import CompilationConfig, CUDAGraphMode, VllmConfig

    config = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=False),
        compilation_config=CompilationConfig(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE),
        scheduler_config=SimpleNamespace(
            max_num_seqs=defaults.max_num_seqs, max_num_batched_tokens=defaults.max_num_batched_tokens
        ),
        uniform_decode_query_len=1,
        num_speculative_tokens=0,
        speculative_config=None,
        performance_mode="balanced",
        lora_config=None,
    )
    VllmConfig._set_cudagraph_sizes(config)
    return config


@pytest.mark.parametrize(
    "defaults",
    [
        BatchDefaults(16384, 1024),
        BatchDefaults(8192, 1024),
        BatchDefaults(2048, 256),
        BatchDefaults(2048, 100),
        BatchDefaults(2048, 37),
        BatchDefaults(300, 300),
        BatchDefaults(7, 3),
    ],
)
def test_graphs_are_those_that_vllm_captures_and_dispatches_to(defaults: BatchDefaults) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    config = vllm_graphs(defaults)
    sizes = capture_sizes(defaults)
    assert list(sizes) == config.compilation_config.cudagraph_capture_sizes
    config.compilation_config.mode = 3
    config.compilation_config.splitting_ops = ["vllm::unified_attention"]
    config.compilation_config.is_attention_compiled_piecewise = lambda: True
    config.compilation_config.compile_sizes = []
    dispatcher = CudagraphDispatcher(config)
    dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL_AND_PIECEWISE, 1)
    names = {CUDAGraphMode.FULL: "full", CUDAGraphMode.PIECEWISE: "piecewise", CUDAGraphMode.NONE: "eager"}
    for decode_only in (True, False):
        most = defaults.max_num_seqs if decode_only else defaults.max_num_batched_tokens
        for tokens in range(1, min(most, 700) + 1):
            mode, graph = dispatcher.dispatch(tokens, uniform_decode=decode_only)
            wanted = None if mode == CUDAGraphMode.NONE else graph.num_tokens
            assert dispatch(tokens, decode_only, sizes, defaults.max_num_seqs) == (names[mode], wanted), tokens


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("deepseek"), "deepseek_v3")


@pytest.mark.parametrize("family", ["mixtral", "deepseek"])
@pytest.mark.parametrize("asked", [None, 1000])
def test_max_model_len_and_chunked_prefill_are_vllms(
    family: str, asked: int | None, request: pytest.FixtureRequest
) -> None:
    from vllm.config import ModelConfig

    from ep.config_keys import read_config

    path = request.getfixturevalue(family)
    theirs = ModelConfig(model=str(path), max_model_len=asked)
    assert context_length(read_config(path), asked).tokens == theirs.max_model_len
    assert theirs.is_chunked_prefill_supported


@pytest.mark.parametrize(
    ("batch", "budget"),
    [
        (Batch(32, 8192, 3), 16384),
        (Batch(32, 1024, 5), 16384),
        (Batch(7, 100, 4), 64),
        (Batch(5, 64, 1), 64),
        (Batch(9, 33, 6), 50),
    ],
)
def test_the_schedule_is_vllms_scheduler(batch: Batch, budget: int, mixtral: Path) -> None:
    """Its own scheduler, step by step, with an engine that answers every request at once."""
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    config = VllmConfig(
        model_config=ModelConfig(model=str(mixtral), skip_tokenizer_init=True, max_model_len=16384),
        cache_config=CacheConfig(block_size=16, enable_prefix_caching=False),
        scheduler_config=SchedulerConfig(
            max_num_seqs=min(64, budget),
            max_num_batched_tokens=budget,
            max_model_len=16384,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            async_scheduling=False,
        ),
        device_config=DeviceConfig("cpu"),
    )
    num_blocks = 2 + batch.num_requests * -(-batch.total_len // 16)
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32)
    scheduler = Scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        block_size=16,
        structured_output_manager=StructuredOutputManager(config),
    )
    for index in range(batch.num_requests):
        sampling = SamplingParams(max_tokens=batch.output_len, ignore_eos=True)
        scheduler.add_request(
            Request(
                request_id=str(index),
                prompt_token_ids=[5] * batch.input_len,
                sampling_params=sampling,
                pooling_params=None,
            )
        )
    prompt_left = {str(index): batch.input_len for index in range(batch.num_requests)}
    theirs = []
    while scheduler.has_unfinished_requests():
        output = scheduler.schedule()
        decode = prefill = 0
        sampled = []
        ids = list(output.num_scheduled_tokens)
        for name in ids:
            tokens = output.num_scheduled_tokens[name]
            if prompt_left[name]:
                prefill += tokens
                prompt_left[name] -= tokens
            else:
                decode += tokens
            sampled.append([] if prompt_left[name] else [7])
        theirs.append((decode, prefill))
        scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={name: index for index, name in enumerate(ids)},
                sampled_token_ids=sampled,
            ),
        )
    ours = [(s.decode_tokens, s.prefill_tokens) for s in schedule(batch, budget) for _ in range(s.count)]
    assert ours == theirs


@pytest.mark.parametrize(("key", "slots", "found"), [("h200", 32, True), ("mi300x", 17, False)])
def test_vllms_own_look_up_of_tuned_files(
    key: str, slots: int, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.fused_moe import fused_moe

    hardware = load_hardware(key)
    for row in tuned_files(hardware, slots, 2048, quantized=True):
        name = row.reported if row.pci_id is None else row.resolved
        monkeypatch.setattr(fused_moe, "get_device_name_as_file_name", lambda name=name: name)
        theirs = fused_moe.get_config_file_name(slots, 2048, "fp8_w8a8", [128, 128])
        assert row.vllm_file == theirs
        fused_moe.get_moe_configs.cache_clear()
        assert row.vllm_found == (fused_moe.get_moe_configs(slots, 2048, "fp8_w8a8", 128, 128) is not None) == found
    fused_moe.get_moe_configs.cache_clear()

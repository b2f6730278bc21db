"""What may stand behind `--`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from ep.announce import router_phase
from ep.engine.failed_step import FailedStep, output_of_all
from ep.errors import OptionError
from ep.presets import load_preset
from ep.target import Target
from ep.vllm_flags import check_free, check_supported, tensor_parallel_size, vllm_flags

AS_PARSED = {
    "pipeline_parallel_size": 1,
    "api_server_count": None,
    "tensor_parallel_size": 1,
    "data_parallel_size": 1,
    "enable_expert_parallel": False,
}


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ((), 1),
        (("--max-model-len", "2"), 1),
        (("--tensor-parallel-size", "2"), 2),
        (("--tensor_parallel_size=4", "--max-model-len", "512"), 4),
        (("-tp", "3"), 3),
        (("-tp=2", "--tensor-parallel-size", "8"), 8),
    ],
)
def test_tensor_parallel_size(flags: tuple[str, ...], size: int) -> None:
    assert tensor_parallel_size(flags) == size


@pytest.mark.parametrize("flags", [("-tp",), ("-tp", "0"), ("--tensor-parallel-size", "two")])
def test_no_size(flags: tuple[str, ...]) -> None:
    with pytest.raises(OptionError, match="expected a number from 1 on"):
        tensor_parallel_size(flags)


def flags_of(*from_user: str, routers: int = 1) -> list[str]:
    target = Target("deepseek-v3", Path("checkpoint"), load_preset("deepseek-v3").spec, stand_in=False)
    return vllm_flags(target, "127.0.0.1", 8000, None, routers, from_user, cpu=True)


def test_routers_are_vllm_s_data_parallel_engines() -> None:
    assert "--data-parallel-size" not in flags_of()
    flags = flags_of(routers=3)
    assert flags[flags.index("--data-parallel-size") + 1] == "3"


@pytest.mark.parametrize("flag", ["--data-parallel-size", "-dp=2", "--data_parallel_rank", "--data-parallel-backend"])
def test_data_parallelism_is_asked_for_by_routers(flag: str) -> None:
    with pytest.raises(OptionError, match=f"{flag} .* --routers N"):
        check_free((flag, "2"))


@pytest.mark.parametrize("flag", ["--model", "--load-format=dummy", "--hf_overrides"])
def test_what_ep_sets_is_not_the_users(flag: str) -> None:
    with pytest.raises(OptionError, match=f"{flag} is set by ep serve itself"):
        check_free(("--max-model-len", "512", flag, "2"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        ({"api_server_count": 0}, "--api-server-count 0"),
        ({"enable_expert_parallel": True}, "--enable-expert-parallel.*--shards"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size 2.*spelt out"),
        ({"data_parallel_size": 2}, "data_parallel_size 2.*--routers"),
    ],
)
def test_what_is_not_supported(change: dict[str, object], words: str) -> None:
    check_supported(Namespace(**AS_PARSED), routers=1, ranks=1)
    with pytest.raises(OptionError, match=words):
        check_supported(Namespace(**{**AS_PARSED, **change}), routers=1, ranks=1)


def test_the_phase_that_all_routers_are_in() -> None:
    assert router_phase({}, 1) == ""
    assert router_phase({0: "warming up"}, 1) == "router: warming up"
    assert router_phase({0: "warming up"}, 2) == ""
    assert router_phase({0: "warming up", 1: "loading attention weights"}, 2) == ""
    assert router_phase({0: "warming up", 1: "warming up"}, 2) == "2 routers: warming up"


def test_one_router_that_fails_fails_the_step() -> None:
    failed = FailedStep("shard 0 is lost")
    assert output_of_all(["a", "b"], output_rank=0) == "a"
    assert output_of_all(["a", failed], output_rank=0) is failed
    assert output_of_all([failed, "b"], output_rank=0) is failed

"""What `ep serve` decides before anything starts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from ep.errors import OptionError, PlacementError
from ep.kernels.p2p import supports
from ep.kernels.p2p_layout import MessageShape
from ep.model import ModelSpec
from ep.presets import load_preset
from ep.serve_options import IPC_SHARDS, ServeOptions, check_memory, first_placement, num_hosted, resolved


@pytest.fixture
def spec() -> ModelSpec:
    return load_preset("deepseek-v3").spec


def test_the_first_placement_has_spares_and_replicas(spec: ModelSpec) -> None:
    placement = first_placement(spec, 8, ServeOptions("deepseek-v3"))
    assert placement.slots.shape == (58, 8, 32 + 2)
    placement = first_placement(spec, 8, ServeOptions("deepseek-v3", redundant=32, spare_slots=0))
    assert placement.slots.shape == (58, 8, 36) and (placement.slots >= 0).all()
    assert first_placement(spec, 8, ServeOptions("deepseek-v3", transport="local")).slots_per_shard == 32
    with pytest.raises(PlacementError, match="100000"):
        first_placement(spec, 8, ServeOptions("deepseek-v3", redundant=100000))


def test_slots_that_do_not_fit_are_refused_with_the_sizes(spec: ModelSpec) -> None:
    """DeepSeek-V3's experts: 58 x 256 x 3 x 7168 x 2048 weights, 654 GB in FP8 and twice that in bf16."""
    options = ServeOptions("deepseek-v3", spare_slots=0, expert_dtype="fp8")
    placement = first_placement(spec, 8, options)
    check_memory(spec, placement, options, 700 * 10**9)
    with pytest.raises(OptionError, match=r"--shards 8 --redundant 0: 14848 slots of 44.05 MB need 654.1 GB"):
        check_memory(spec, placement, options, 600 * 10**9)
    with pytest.raises(OptionError, match=r"need 1307\.8 GB"):
        check_memory(spec, placement, dataclasses.replace(options, expert_dtype="auto"), 700 * 10**9)


@pytest.mark.parametrize(
    ("shards", "routers", "gpus", "asked", "hosted"),
    [
        (7, 1, 8, None, 0),  # a GPU for each
        (8, 1, 8, None, 1),
        (8, 8, 8, None, 8),  # attention and experts on every GPU
        (2, 2, 2, None, 2),
        (1, 1, 2, None, 0),
        (1, 1, 2, True, 1),
        (2, 2, 2, False, 0),
        (2, 2, 0, None, 0),  # on CPUs only if asked
        (2, 3, 0, True, 2),
    ],
)
def test_shards_live_with_routers_where_gpus_are_few(
    shards: int, routers: int, gpus: int, asked: bool | None, hosted: int
) -> None:
    options = ServeOptions("deepseek-v3", transport="ipc", share_gpus=asked)
    assert num_hosted(options, shards, routers, gpus) == hosted
    assert num_hosted(ServeOptions("deepseek-v3"), shards, routers, gpus) == 0


@pytest.mark.parametrize(
    ("given", "num_gpus", "shards", "transport"),
    [
        ({}, 8, 8, "ipc"),
        ({}, 1, 1, "ipc"),
        ({}, 6, 4, "ipc"),  # 256 experts on 6 are 43 for some and 41 for one
        ({"shards": 16}, 8, 16, "ipc"),
        ({"shards": IPC_SHARDS + 8}, 8, IPC_SHARDS + 8, "socket"),
        ({"transport": "socket"}, 8, 8, "socket"),
        ({"transport": "local"}, 8, 1, "local"),
        ({"shards": 3}, 0, 3, "socket"),
        ({"shards": 2, "transport": "ipc"}, 0, 2, "ipc"),
    ],
)
def test_what_is_left_open_goes_by_the_gpus(
    given: dict[str, Any], num_gpus: int, shards: int, transport: str, spec: ModelSpec
) -> None:
    options = ServeOptions("deepseek-v3", **given)
    found = resolved(options, spec.num_experts, num_gpus)
    assert (found.shards, found.transport) == (shards, transport)
    assert found == resolved(found, spec.num_experts, num_gpus)
    assert dataclasses.replace(found, shards=options.shards, transport=options.transport) == options


def test_without_gpus_a_shard_a_core_and_no_more_than_two(spec: ModelSpec) -> None:
    found = resolved(ServeOptions("deepseek-v3"), spec.num_experts, 0)
    assert found.transport == "socket" and found.shards in (1, 2)


def test_ipc_reaches_so_many_shards() -> None:
    message = MessageShape(16, 128, 2, torch.bfloat16)
    assert supports(message, IPC_SHARDS, 1)[0] and not supports(message, IPC_SHARDS + 1, 1)[0]

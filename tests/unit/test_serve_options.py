"""What `ep serve` decides before anything starts."""

from __future__ import annotations

import dataclasses

import pytest

from ep.errors import OptionError, PlacementError
from ep.model import ModelSpec
from ep.presets import load_preset
from ep.serve import ServeOptions, check_memory, first_placement, num_hosted


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

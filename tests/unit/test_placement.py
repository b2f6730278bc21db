"""Placements: every expert somewhere, the lookup is the inverse of the slots, nothing impossible gets through."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep.errors import PlacementError
from ep.placement import EMPTY, Placement, even_split, with_spares, without_spares


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Random placements with replicas and empty slots."""
    num_layers, num_shards, num_experts = (draw(st.integers(1, n)) for n in (3, 4, 9))
    layers = []
    for _ in range(num_layers):
        shards: list[set[int]] = [set() for _ in range(num_shards)]
        for expert in range(num_experts):
            for shard in draw(st.sets(st.integers(0, num_shards - 1), min_size=1)):
                shards[shard].add(expert)
        layers.append([draw(st.permutations(sorted(shard))) for shard in shards])
    num_slots = max(len(shard) for layer in layers for shard in layer) + draw(st.integers(0, 2))
    slots = [[[*shard, *[EMPTY] * (num_slots - len(shard))] for shard in layer] for layer in layers]
    return Placement(draw(st.integers(0, 5)), num_experts, np.array(slots, dtype=np.int32))


@given(placements())
def test_lookup_is_the_inverse_of_slots(placement: Placement) -> None:
    lookup = placement.lookup()
    found = set()
    for layer in range(placement.num_moe_layers):
        for expert in range(placement.num_experts):
            count = lookup.num_replicas[layer, expert]
            assert (lookup.shard_idx[layer, expert, count:] == EMPTY).all()
            assert (lookup.slot_idx[layer, expert, count:] == EMPTY).all()
            pairs = list(zip(lookup.shard_idx[layer, expert, :count], lookup.slot_idx[layer, expert, :count]))
            assert pairs == sorted(pairs)
            for shard, slot in pairs:
                assert placement.slots[layer, shard, slot] == expert
                found.add((layer, int(shard), int(slot)))
    assert found == {tuple(map(int, index)) for index in np.argwhere(placement.slots != EMPTY)}


@given(placements())
def test_survives_msgpack(placement: Placement) -> None:
    again = Placement.from_dict(msgpack.unpackb(msgpack.packb(placement.to_dict())))
    assert again == placement and hash(again) == hash(placement)


@given(st.integers(1, 4), st.integers(1, 40), st.data())
def test_even_split_is_even_and_contiguous(num_layers: int, num_experts: int, data: st.DataObject) -> None:
    num_shards = data.draw(st.integers(1, num_experts))
    placement = even_split(num_layers, num_experts, num_shards)
    assert placement.generation == 0
    for layer in placement.slots:
        sizes = [(shard != EMPTY).sum() for shard in layer]
        assert max(sizes) - min(sizes) <= 1 and max(sizes) == placement.slots_per_shard
        assert [expert for shard in layer for expert in shard if expert != EMPTY] == list(range(num_experts))


@given(placements(), st.integers(0, 3))
def test_spares_are_empty_slots_behind_the_others(placement: Placement, num_spares: int) -> None:
    spared = with_spares(placement, num_spares)
    assert spared.slots_per_shard == placement.slots_per_shard + num_spares
    assert (spared.slots[:, :, placement.slots_per_shard :] == EMPTY).all()
    again = Placement(spared.generation, spared.num_experts, spared.slots[:, :, : placement.slots_per_shard])
    assert again == placement


def test_fewer_than_no_spares() -> None:
    with pytest.raises(PlacementError, match="spares is -1, expected at least 0"):
        with_spares(even_split(1, 4, 2), -1)


@pytest.mark.parametrize("num_shards", [0, 9])
def test_more_shards_than_experts(num_shards: int) -> None:
    with pytest.raises(PlacementError, match=f"shards is {num_shards}, expected 1 to 8"):
        even_split(2, 8, num_shards)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([[[0, 1], [2, 3]], [[0, 1], [2, EMPTY]]], "expert 3 of MoE layer 1 is in no slot"),
        ([[[0, 1, 1], [2, 3, EMPTY]]], "shard 0 holds expert 1 of MoE layer 0 more than once"),
        ([[[0, 1], [2, 4]]], "holds expert 4, expected -1 to 3"),
        ([[[0, 1], [2, -2]]], "holds expert -2"),
        ([[0, 1], [2, 3]], "have shape"),
        (np.zeros((1, 0, 4), dtype=np.int32), "have shape"),
    ],
)
def test_impossible_placements(slots: list[object], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        Placement(0, 4, np.array(slots, dtype=np.int32))


def test_slots_cannot_be_changed() -> None:
    source = np.zeros((1, 1, 1), dtype=np.int32)
    placement = Placement(0, 1, source)
    source[:] = 7
    assert placement.slots[0, 0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        placement.slots[0, 0, 0] = 1


@pytest.mark.parametrize("table", [{}, {"generation": 0, "num_experts": 1, "shape": [1, 1, 2], "slots": b"\0" * 4}])
def test_not_a_placement(table: dict[str, object]) -> None:
    with pytest.raises(PlacementError, match="not a placement"):
        Placement.from_dict(table)


@pytest.mark.parametrize("num_spares", [0, 1, 3])
def test_spares_go_as_they_came(num_spares: int) -> None:
    placement = even_split(2, 10, 3)
    assert without_spares(with_spares(placement, num_spares)) == placement
    gaps = np.array(with_spares(placement, num_spares).slots)[:, :, ::-1]
    held = without_spares(Placement(1, 10, gaps)).slots
    assert np.array_equal(np.sort(held, axis=2), np.sort(placement.slots, axis=2))

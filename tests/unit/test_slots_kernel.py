"""Slots and counts of a router's own GPU: the kernel against its twin, and against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep.kernels import reference, slots
from tests.unit.kernel_cases import on_cpu


@on_cpu
@settings(max_examples=25)
@given(
    num_rows=st.integers(0, 70),
    top_k=st.sampled_from([1, 2, 8]),
    sizes=st.tuples(st.integers(0, 90), st.integers(0, 90)),
    layer_pos=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_slots_and_counts_are_the_twins(
    num_rows: int, top_k: int, sizes: tuple[int, int], layer_pos: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, 13, (num_rows, top_k), generator=generator).int()  # 12 is no expert, and -1 is none
    slot_of = torch.stack([torch.randperm(12, generator=generator) for _ in range(3)]).int()
    words = torch.tensor(sizes, dtype=torch.int32)
    counts = [torch.full((2, 3, 12), 5, dtype=torch.int64) for _ in range(2)]
    got = slots.assign_slots(ids, slot_of, words, counts[0], layer_pos)
    assert torch.equal(got.slots, reference.assign_slots(ids, slot_of, words, counts[1], layer_pos))
    assert torch.equal(*counts) and got.num_tokens.tolist() == [min(sizes[0], num_rows)]
    tokens = ids[: sizes[0]]
    for phase, of_phase in ((1, tokens[: sizes[1]]), (0, tokens[sizes[1] :])):
        chosen = of_phase.numpy().ravel()
        chosen = chosen[(chosen >= 0) & (chosen < 12)]
        assert np.array_equal(counts[0][phase, layer_pos].numpy() - 5, np.bincount(chosen, minlength=12))
    assert not (counts[0][:, [layer for layer in range(3) if layer != layer_pos]] - 5).any()


def test_what_int32_does_not_reach_is_refused() -> None:
    assert slots.supports(1 << 28, 8, 58, 256) == (
        False, "2147483648 choices, expected fewer than 2147483648",
    )  # fmt: skip
    with pytest.raises(ValueError, match="counters, expected fewer than"):
        slots.assign_slots(
            torch.zeros(1, 8, dtype=torch.int32, device="meta"),
            torch.zeros(1 << 20, 1 << 10, dtype=torch.int32, device="meta"),
            torch.zeros(2, dtype=torch.int32, device="meta"),
            torch.zeros(2, 1, 1, device="meta"),
            0,
        )

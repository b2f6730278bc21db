"""Tokens in slot order against a stable sort, in the interpreter: one pass and two, of any number of choices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep.kernels import permute
from tests.unit.kernel_cases import on_cpu

HIDDEN, POISON = 128, -7
pytestmark = on_cpu


@settings(max_examples=25)
@given(
    top_k=st.integers(1, 9),
    num_slots=st.integers(1, 40),
    capacity=st.integers(1, 12),
    dropped=st.integers(0, 3),
    block_m=st.sampled_from([16, 32]),
    one_pass=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_rows_and_blocks_are_those_of_a_stable_sort(
    top_k: int, num_slots: int, capacity: int, dropped: int, block_m: int, one_pass: bool, seed: int
) -> None:
    """Ids of -1 and past the last slot are other shards'; two passes count chunks of 16 assignments."""
    generator = torch.Generator().manual_seed(seed)
    # Few distinct slots now and then, so that one has several blocks.
    slot_ids = torch.randint(-1, 2 + seed % num_slots, (capacity, top_k), dtype=torch.int32, generator=generator)
    num_tokens = max(capacity - dropped, 0)
    x = torch.randn(capacity, HIDDEN, generator=generator).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permute, "MAX_ONE_PASS_ASSIGNMENTS", 4096 if one_pass else 0)
        patch.setattr(permute, "CHUNK_ASSIGNMENTS", 16)
        chunks = permute.num_chunks(capacity, top_k)
        scratch = torch.full((2, chunks, num_slots), POISON, dtype=torch.int32)
        rows = torch.full((slot_ids.numel(), HIDDEN), POISON, dtype=torch.bfloat16)
        assignment = torch.full((slot_ids.numel(),), POISON, dtype=torch.int32)
        max_blocks = permute.max_row_blocks(slot_ids.numel(), num_slots, block_m)
        blocks = torch.full((max_blocks, permute.BLOCK_FIELDS), POISON, dtype=torch.int32)
        num_blocks = torch.full((1,), POISON, dtype=torch.int32)
        permute.permute_tokens(
            x, None, slot_ids, torch.tensor([num_tokens], dtype=torch.int32), rows, None, assignment, blocks,
            num_blocks, scratch[0], scratch[1], None, num_slots=num_slots, block_m=block_m, fp8_max=0.0,
        )  # fmt: skip

    flat = slot_ids[:num_tokens].flatten()
    here = ((flat >= 0) & (flat < num_slots)).nonzero().flatten()
    order = here[flat[here].argsort(stable=True)]
    assert assignment.tolist() == order.tolist() + [POISON] * (len(assignment) - len(order))
    assert torch.equal(rows[: len(order)], x[order // top_k])
    assert (rows[len(order) :] == POISON).all()

    table, start = [], 0
    for slot, count in enumerate(torch.bincount(flat[here], minlength=num_slots).tolist()):
        end = start + count
        table += [[slot, first, min(first + block_m, end)] for first in range(start, end, block_m)]
        start = end
    assert num_blocks.item() == len(table)
    assert blocks[: len(table), :3].tolist() == table
    assert (blocks[len(table) :] == POISON).all()

"""Block quantisation: code for code what the torch twin chooses, and the exact change of e4m3 flavour."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep.kernels import quant, reference
from tests.unit.kernel_cases import on_cpu

FLAVOURS = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def assert_same_codes(x: torch.Tensor, dtype: torch.dtype) -> None:
    got, expected = quant.quantize_tokens(x, dtype), reference.quantize_tokens(x, dtype)
    assert torch.equal(got.scale_inv, expected.scale_inv)
    assert torch.equal(got.q.float(), expected.q.float())  # equal for +0 and -0 alone


@on_cpu
@settings(max_examples=15)
@given(
    dtype=st.sampled_from(FLAVOURS),
    kind=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    shape=st.tuples(st.integers(0, 4), st.integers(1, 5)),
    exponent=st.integers(-14, 4),
    seed=st.integers(0, 2**31),
)
def test_codes_are_the_twins(
    dtype: torch.dtype, kind: torch.dtype, shape: tuple[int, int], exponent: int, seed: int
) -> None:
    tokens, blocks = shape
    x = torch.randn(tokens, blocks * 128, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    assert_same_codes(x.to(kind), dtype)


@on_cpu
@pytest.mark.parametrize("dtype", FLAVOURS)
def test_ties_zeros_and_extremes(dtype: torch.dtype) -> None:
    """With an amax of 7 / 4 bf16 numbers lie on midpoints between codes; a block of zeros, the smallest and largest."""
    ties = torch.arange(1, 129).float() * (1.75 / 128)
    rows = [ties, torch.zeros(128), torch.full((128,), 3e38), torch.linspace(-1e-12, 1e-12, 128)]
    assert_same_codes(torch.stack(rows).bfloat16(), dtype)


def test_all_256_codes_keep_their_value_in_fnuz() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    changed = quant.to_fnuz(codes, torch.tensor(0.375))
    before, after = codes.float() * 0.375, changed.q.float() * changed.scale_inv
    assert torch.equal(before.isnan(), after.isnan())
    assert torch.equal(before[~before.isnan()], after[~after.isnan()])


@pytest.mark.parametrize(
    ("x", "dtype", "reason"),
    [
        (torch.zeros(2, 100), torch.float8_e4m3fn, r"\(2, 100\), expected \[T, a multiple of 128\]"),
        (torch.zeros(2, 128), torch.int8, "target dtype is torch.int8"),
        (torch.zeros(2, 128).long(), torch.float8_e4m3fn, "input dtype is torch.int64"),
        (torch.zeros(128, 2).T, torch.float8_e4m3fn, "contiguous columns"),
    ],
)
def test_unsupported_inputs_are_named(x: torch.Tensor, dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        quant.quantize_tokens(x, dtype)

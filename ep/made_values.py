"""Fills a tensor with made-up values that depend on a key and the element's place in it alone.

A counter-based hash: the bytes of 32-bit words, each a mix of its own number and the key, choose among 256 values of a
table. Integer operations and a look-up, nothing rounds: a CPU and a GPU make the same bits, whole or in pieces.
"""

from __future__ import annotations

import hashlib
from statistics import NormalDist

import torch

RULE_VERSION = 1
"""Raise it when the same seed and name give other values."""

NORMAL = tuple(NormalDist().inv_cdf((idx + 0.5) / 256) for idx in range(256))
"""256 values of equal chance in a normal distribution of zero mean; their standard deviation is 0.9975."""

_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_CHUNK_VALUES = {"cpu": 1 << 15, "cuda": 1 << 24}
"""Values made at once. On a CPU what torch computes in one thread: for steps so short others are not worth waking."""

# Wellons' lowbias32, in int32: torch multiplies modulo 2^32 there, but shifts the sign in.
_SHIFTS = (16, 15, 16)
_FACTORS = (0x7FEB352D, 0x846CA68B - (1 << 32))


def make_key(seed: int, name: str) -> tuple[int, int]:
    """Two int32 numbers of one seed and tensor name."""
    raw = hashlib.blake2b(f"{RULE_VERSION}/{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(raw[:4], "little", signed=True), int.from_bytes(raw[4:], "little", signed=True)


def fill(out: torch.Tensor, table: torch.Tensor, key: tuple[int, int], chunk: int | None = None) -> None:
    """Fills `out`, contiguous, on any device, with entries of table [256] of its dtype.

    chunk: how many at once, a multiple of 4; the values do not depend on it.
    """
    assert out.is_contiguous() and table.shape == (256,) and table.dtype == out.dtype
    raw = _BYTES[out.itemsize]
    values, choices = out.view(-1).view(raw), table.to(out.device).view(raw)
    step = chunk or _CHUNK_VALUES.get(out.device.type, 1 << 20)
    step = min(step, -(-len(values) // 4) * 4)
    numbers = torch.arange(step // 4, dtype=torch.int32, device=out.device)
    words, scratch = torch.empty_like(numbers), torch.empty_like(numbers)
    idx = torch.empty(step, dtype=torch.int32, device=out.device)
    for start in range(0, len(values), step):
        torch.add(numbers, start // 4, out=words)
        _mix(words, scratch, key)
        idx.copy_(words.view(torch.uint8))
        piece = values[start : start + step]
        torch.index_select(choices, 0, idx[: len(piece)], out=piece)


def _mix(words: torch.Tensor, scratch: torch.Tensor, key: tuple[int, int]) -> None:
    """words int32, in place. The key's second half comes in between, or tensors would be reorderings of each other."""
    words.bitwise_xor_(key[0])
    _fold(words, scratch, _SHIFTS[0])
    words.mul_(_FACTORS[0]).bitwise_xor_(key[1])
    _fold(words, scratch, _SHIFTS[1])
    words.mul_(_FACTORS[1])
    _fold(words, scratch, _SHIFTS[2])


def _fold(words: torch.Tensor, scratch: torch.Tensor, shift: int) -> None:
    """words ^= words >> shift, as unsigned."""
    torch.bitwise_right_shift(words, shift, out=scratch)
    scratch.bitwise_and_((1 << 32 - shift) - 1)
    words.bitwise_xor_(scratch)

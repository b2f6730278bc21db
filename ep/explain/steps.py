"""What a rule of vLLM's makes of a batch: its settings, and the steps that the batch takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["prefill", "mixed", "decode"]


@dataclass(frozen=True)
class Batch:
    """num_requests that arrive at once, each with input_len tokens, each answered with output_len."""

    num_requests: int
    input_len: int
    output_len: int

    @property
    def total_len(self) -> int:
        return self.input_len + self.output_len


@dataclass(frozen=True)
class Step:
    """Some equal steps, or steps that differ in their tokens only.

    tokens: of a step, from the fewest to the most. detail: what the tokens are. positions: the sequence lengths that a
    decode step sees, None for others. padded: the size of the graph. graph: "full", "piecewise" or "eager".
    """

    phase: Phase
    count: int
    tokens: tuple[int, int]
    detail: str
    captured: bool
    graph: str
    why: str
    positions: tuple[int, int] | None = None
    padded: int | None = None


@dataclass(frozen=True)
class ChunkedPrefill:
    """enabled: on this device. budget: max_num_batched_tokens. chunks: steps that one request's input takes at least.

    by_length: whether the model's length alone turns it on; None where the rule does not ask for it.
    """

    enabled: bool
    why: str
    budget: int
    chunks: int
    by_length: bool | None = None


@dataclass(frozen=True)
class Rule:
    """engine: which vLLM. max_captured_len: sequences longer than that run eager, None where length does not matter.

    running: how many of the batch's requests run at once.
    """

    engine: str
    chunked_prefill: ChunkedPrefill
    capture_sizes: tuple[int, ...]
    conditions: tuple[str, ...]
    max_num_seqs: int
    running: int
    steps: tuple[Step, ...]
    max_captured_len: int | None = None
    notes: tuple[str, ...] = ()


def padded_size(num_tokens: int, sizes: tuple[int, ...]) -> int | None:
    """The smallest captured size that holds so many tokens; None where none does."""
    return next((size for size in sizes if size >= num_tokens), None)


def count_tokens(number: int) -> str:
    return f"{number:,} token{'' if number == 1 else 's'}"

"""Which tokens are decode tokens, from forward contexts as vLLM makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from vllm.forward_context import ForwardContext, override_forward_context

from ep.engine.phases import token_phases


@dataclass
class Metadata:
    query_start_loc: torch.Tensor


def context(metadata: Any) -> ForwardContext:
    return ForwardContext(no_compile_layers={}, attn_metadata=metadata, slot_mapping={})


def test_requests_with_one_token_decode() -> None:
    # Requests of 1, 3, 1 and 2 tokens, then a padding request of none.
    metadata = Metadata(torch.tensor([0, 1, 4, 5, 7, 7], dtype=torch.int32))
    with override_forward_context(context({"layers.0.attn": metadata, "layers.1.attn": metadata})):
        phases = token_phases()
    assert phases is not None
    assert phases.tolist() == [True, False, False, False, True, False, False]


@pytest.mark.parametrize("metadata", [None, {}, [{}, {}], {"layers.0.attn": object()}])
def test_unknown(metadata: Any) -> None:
    with override_forward_context(context(metadata)):
        assert token_phases() is None


def test_outside_of_a_forward_pass() -> None:
    assert token_phases() is None

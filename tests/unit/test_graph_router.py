"""The router of a GPU that holds all slots, its kernels interpreted and its experts the reference's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ep.errors import PlacementError
from ep.graph_router import GraphRouter
from ep.kernels import reference
from ep.load import Window
from ep.placement import Placement, even_split
from ep.recorder import LoadRecorder
from tests.unit.kernel_cases import on_cpu
from tests.unit.shards import expected, make_experts, make_spec, random_routing, relative_error

SPEC = make_spec(hidden_size=128)
EXPERTS = make_experts(SPEC, torch.bfloat16)
MAX_TOKENS = 32
pytestmark = on_cpu


class ReferenceCompute:
    """Experts where the placement has them, as GpuCompute is asked for them."""

    def __init__(self, placement: Placement) -> None:
        self._slots = [torch.from_numpy(slots[slots >= 0].astype(np.int64)) for slots in placement.slots[:, 0]]

    def partials(
        self, layer_pos: int, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, num_tokens: torch.Tensor
    ) -> torch.Tensor:
        here, layer = self._slots[layer_pos], EXPERTS[layer_pos]
        held = reference.Experts(layer.w13[here], layer.w2[here])
        out = torch.full_like(x, float("nan"))
        real = slice(0, int(num_tokens))
        out[real] = reference.experts_forward(x[real].float(), slots[real], weights[real], held).bfloat16()
        return out


def shuffled(generation: int) -> Placement:
    """Every layer's experts in an order of its own."""
    even = even_split(SPEC.num_moe_layers, SPEC.num_experts, 1)
    orders = np.random.default_rng(generation).permuted(even.slots, axis=2)
    return Placement(generation, SPEC.num_experts, orders)


def make_router(placement: Placement) -> GraphRouter:
    router = GraphRouter(SPEC, placement, lambda: ReferenceCompute(placement), MAX_TOKENS, torch.device("cpu"))  # type: ignore[arg-type,return-value]
    router.open_slots()
    return router


def check_layers(router: GraphRouter, num_rows: int, num_tokens: int, seed: int) -> torch.Tensor:
    """The chosen experts."""
    hidden, ids, weights = random_routing(SPEC, num_rows, seed)
    hidden = hidden.bfloat16()
    for layer_pos in range(SPEC.num_moe_layers):
        router.dispatch(layer_pos, hidden, ids.int(), weights)
        routed = router.combine(layer_pos)
        wanted = expected(EXPERTS[layer_pos], hidden, ids, weights)[:num_tokens]
        assert relative_error(routed[:num_tokens], wanted) < 0.02
    return ids[:num_tokens]


def test_sums_are_the_references_wherever_experts_lie_and_load_is_what_was_chosen() -> None:
    router = make_router(shuffled(0))
    windows: list[Window] = []
    router.recorder = LoadRecorder(SPEC, 1, window_s=1000, on_window=windows.append)
    router.recorder.before_close = router.take_load
    check_layers(router, MAX_TOKENS, MAX_TOKENS, seed=9)  # as vLLM warms up: it is not counted
    chosen = []
    for num_rows, num_tokens, num_requests, num_decode in ((8, 7, 7, None), (16, 9, 2, None), (16, 12, 5, 4)):
        with router.step(num_tokens, num_requests, num_decode) as step:
            chosen.append(check_layers(router, num_rows, num_tokens, seed=step).numpy())
        assert router.failure(step) is None
    router.recorder.flush()
    (window,) = windows
    decode, prefill = np.concatenate([chosen[0], chosen[2][:4]]), np.concatenate([chosen[1], chosen[2][4:]])
    for found, wanted in ((window.decode, decode), (window.prefill, prefill)):
        counts = np.bincount(wanted.ravel(), minlength=SPEC.num_experts)
        assert np.array_equal(found, [counts] * SPEC.num_moe_layers)
    assert (window.num_steps, window.num_decode_tokens, window.num_prefill_tokens) == (3, 7 + 4, 9 + 8)
    (link,) = router.stats()
    assert (link.tokens, link.requests) == (28 * SPEC.num_moe_layers, 3 * SPEC.num_moe_layers)
    assert link.pairs == link.tokens * SPEC.top_k == sum(one.pairs for one in window.links)


def test_slots_in_several_processes_are_not_its_own() -> None:
    with pytest.raises(PlacementError, match="2 shards"):
        make_router(even_split(SPEC.num_moe_layers, SPEC.num_experts, 2))

"""The ops through which a compiled model reaches its router, in a graph that Inductor orders."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._inductor import config as inductor_config

from ep.engine.ops import bind_router, register_ops
from ep.share import Share

NUM_TOKENS, HIDDEN, TOP_K = 8, 64, 2


class Recorder:
    """A router that notes who calls, and answers with the rows that it was sent."""

    share = Share(0, 1)

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._hidden = torch.empty(0)

    def dispatch(self, layer_pos: int, hidden: torch.Tensor, topk_ids: torch.Tensor, weights: torch.Tensor) -> None:
        self.calls.append("dispatch")
        self._hidden = hidden.clone()

    def combine(self, layer_pos: int) -> torch.Tensor:
        self.calls.append("combine")
        return self._hidden


@pytest.fixture
def router() -> Iterator[Recorder]:
    register_ops()
    recorder = Recorder()
    bind_router(recorder)  # type: ignore[arg-type]
    yield recorder
    bind_router(None)


def test_the_shared_expert_runs_between_dispatch_and_combine(router: Recorder) -> None:
    library = torch.library.Library("ep_test", "FRAGMENT")
    library.define("project(Tensor x, Tensor weight, Tensor(a!) out) -> ()")

    def project(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        router.calls.append("project")
        out.copy_(x @ weight)

    library.impl("project", project, "CPU")
    torch.library.register_fake("ep_test::project", lambda *_: None, lib=library)

    def block(x: torch.Tensor, norm: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> tuple:
        hidden = torch.nn.functional.rms_norm(x, (HIDDEN,), norm)
        weights, ids = (hidden @ gate).topk(TOP_K)
        ticket = torch.ops.ep.dispatch(hidden, ids, weights, 0)
        wide = hidden.new_empty(len(hidden), up.shape[1])
        torch.ops.ep_test.project(hidden, up, wide)
        shared = torch.empty_like(hidden)
        torch.ops.ep_test.project(torch.nn.functional.silu(wide), down, shared)
        return torch.ops.ep.combine(ticket, shared, hidden, ids, weights, 0) + shared, hidden

    torch.manual_seed(0)
    sizes = ((NUM_TOKENS, HIDDEN), (HIDDEN,), (HIDDEN, 16), (HIDDEN, 512), (512, HIDDEN))
    operands = [torch.randn(*size) for size in sizes]
    with torch.inference_mode(), inductor_config.patch(force_disable_caches=True):
        expected = block(*operands)
        router.calls.clear()
        got = torch.compile(block)(*operands)
    assert router.calls == ["dispatch", "project", "project", "combine"]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)

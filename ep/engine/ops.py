"""The torch ops through which vLLM's (compiled) model reaches the router of its process.

    topk_ids, topk_weights ─> ep::dispatch ─> ticket ─┐
    hidden ─> shared expert ──────────────────────────┴─> ep::combine ─> routed sum

Splitting the round trip in two lets the shared expert run while the shards compute, also in a compiled graph: `combine`
takes the shared expert's output as an argument only to be ordered behind it, and what was dispatched only to keep a
compiled graph from reusing that memory while a shard may still have to be asked again.

Where captured graphs end before these ops and begin again behind them, what comes next reads the memory that it was
captured with: `combine_into` writes the sum there.

`ep::route` is the gate's choice as one kernel, where experts are computed by GPUs. A router with a share of the rows
(tensor-parallel attention) is given all of them and combines its own.

Shape legend: T tokens, H hidden, E logical experts, K top-k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ep.graph_router import GraphRouter
    from ep.group_router import GroupRouter
    from ep.ipc_router import IpcRouter
    from ep.router import Router

    AnyRouter = Router | GroupRouter | GraphRouter | IpcRouter

SPLITTING_OPS = ("ep::dispatch", "ep::combine_into")
"""Where captured graphs of parts of a step end, if the host has a part in a layer."""

_library: torch.library.Library | None = None
_router: AnyRouter | None = None


def bind_router(router: AnyRouter | None) -> None:
    """Make `router` the one that this process's ops use."""
    global _router
    _router = router


def bound_router() -> AnyRouter:
    """The router of this process; models are only built inside a router actor, after it was bound."""
    assert _router is not None, "ep's model classes run inside a router actor only: start them with `ep serve`"
    return _router


def register_ops() -> None:
    """Define ep::dispatch, ep::combine, ep::combine_into and ep::route; a second call does nothing."""
    global _library
    if _library is not None:
        return
    library = torch.library.Library("ep", "DEF")
    choice = "Tensor topk_ids, Tensor topk_weights, int layer_pos"
    sent = f"Tensor ticket, Tensor after, Tensor hidden, {choice}"
    # It changes nothing. A compiler that may put what reads hidden before it does so, and with it the shared expert.
    library.define(f"dispatch(Tensor(a!) hidden, {choice}) -> Tensor")
    library.define(f"combine({sent}) -> Tensor")
    library.define(f"combine_into({sent}, Tensor(a!) out) -> ()")
    for key in ("CPU", "CUDA"):
        library.impl("dispatch", _dispatch, key)
        library.impl("combine", _combine, key)
        library.impl("combine_into", _combine_into, key)
    library.define("route(Tensor logits, Tensor? bias) -> (Tensor, Tensor)")
    library.impl("route", _route, "CUDA")
    torch.library.register_fake("ep::route", _route_fake, lib=library)
    torch.library.register_fake("ep::dispatch", _dispatch_fake, lib=library)
    torch.library.register_fake("ep::combine", _combine_fake, lib=library)
    torch.library.register_fake("ep::combine_into", lambda *_: None, lib=library)
    _library = library


def _dispatch(hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, layer_pos: int) -> torch.Tensor:
    bound_router().dispatch(layer_pos, hidden, topk_ids, topk_weights)
    return hidden.new_empty(0)


def _combine(
    ticket: torch.Tensor,
    after: torch.Tensor,
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    layer_pos: int,
) -> torch.Tensor:
    return bound_router().combine(layer_pos)


def _combine_into(
    ticket: torch.Tensor,
    after: torch.Tensor,
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    layer_pos: int,
    out: torch.Tensor,
) -> None:
    out.copy_(bound_router().combine(layer_pos))


def _dispatch_fake(
    hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, layer_pos: int
) -> torch.Tensor:
    return hidden.new_empty(0)


def _combine_fake(
    ticket: torch.Tensor,
    after: torch.Tensor,
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    layer_pos: int,
) -> torch.Tensor:
    return empty_sum(hidden)


def empty_sum(hidden: torch.Tensor) -> torch.Tensor:
    """Memory for what combine gives for hidden [T, H]."""
    share = bound_router().share
    # Not len(hidden), which would make a constant of a traced graph's number of tokens.
    num_tokens, hidden_size = hidden.shape
    return torch.empty_like(hidden) if share.size == 1 else hidden.new_empty(share.length(num_tokens), hidden_size)


def _route(logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    from ep.kernels.gating import route  # needs Triton

    routing = route(logits, bias, bound_router().spec)
    return routing.topk_ids, routing.topk_weights


def _route_fake(logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], bound_router().spec.top_k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float32)

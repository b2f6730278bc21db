"""A router among several that compute the same batch: each dispatches its share of the rows.

    rank 0   rows 0..c-1   ─> dispatch ─> combine ─> [c, H] ─┐
    rank 1   rows c..2c-1  ─> dispatch ─> combine ─> [c, H] ─┴─ vLLM's all-gather ─> [T, H] on every rank

Between two collectives no rank may leave the step: the others would wait for it. So a failure is kept until the step's
end, and the rows are zeros until then; nothing of such a step is ever sampled.

Shape legend: T tokens, H hidden, K top-k, c rows of the longest share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ep.errors import TransportError
from ep.model import ModelSpec
from ep.recovery import StepFailure
from ep.router import Router
from ep.share import Share


class GroupRouter:
    """What the model's ops see of a Router that has only a share of every batch."""

    def __init__(self, router: Router, share: Share) -> None:
        self.share = share
        self._router = router
        self._in_step = False
        self._failure: TransportError | None = None
        self._like: torch.Tensor | None = None

    @property
    def spec(self) -> ModelSpec:
        return self._router.spec

    def open_slots(self) -> None:
        self._router.open_slots()

    @contextmanager
    def step(self, num_tokens: int, num_requests: int, num_decode: int | None = None) -> Iterator[int]:
        """As Router.step. Raises at its end what kept a layer of it from being computed."""
        self._failure, self._in_step = None, True
        try:
            with self._router.step(num_tokens, num_requests) as step:
                yield step
                if self._failure is not None:
                    raise self._failure
        finally:
            self._failure, self._in_step = None, False

    def failure(self, step: int) -> StepFailure | None:
        return self._router.failure(step)

    def dispatch(
        self, layer_pos: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> None:
        """Sends this router's rows of hidden [T, H] to the shards of topk_ids int [T, K]."""
        self._like = hidden.new_zeros(self.share.length(len(hidden)), hidden.shape[1])
        if self._failure is not None:
            return
        try:
            self._router.dispatch(layer_pos, hidden, topk_ids, topk_weights, self.share.rows(len(hidden)))
        except TransportError as error:
            self._keep(error)

    def combine(self, layer_pos: int) -> torch.Tensor:
        """The routed sum of this router's rows, padded with zeros to [c, H]; zeros after a failure in this step.

        Outside of a step failures are raised at once, as Router.combine does.
        """
        padded, self._like = self._like, None
        assert padded is not None, "combine follows dispatch"
        if self._failure is None:
            try:
                routed = self._router.combine(layer_pos)
                padded[: len(routed)] = routed
            except TransportError as error:
                self._keep(error)
        return padded

    def _keep(self, error: TransportError) -> None:
        if not self._in_step:
            raise error
        self._failure = error

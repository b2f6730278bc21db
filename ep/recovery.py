"""What routers say of losses that were mended, and of steps that were not whole."""

from __future__ import annotations

from dataclasses import dataclass

from ep.errors import TransportError


@dataclass(frozen=True)
class Recovery:
    """A gap: shard_idx was lost and answered again `seconds` after the loss was noticed. layer_pos: of the layer whose
    work was sent again; None between steps."""

    shard_idx: int
    layer_pos: int | None
    seconds: float
    reason: str


@dataclass(frozen=True)
class StepFailure:
    """What kept a step from being whole. again: it is mended before the next step, in which the same may be tried."""

    error: TransportError
    again: bool

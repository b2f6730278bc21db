"""What a router returns in place of a model output when a step could not be computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FailedStep:
    """The step's requests are to end with `message`; no token was sampled."""

    message: str


def output_of_all(outputs: Sequence[Any], output_rank: int) -> Any:
    """The output of a step that several routers computed: the failure of any of them, else output_rank's own."""
    failed = next((output for output in outputs if isinstance(output, FailedStep)), None)
    return outputs[output_rank] if failed is None else failed

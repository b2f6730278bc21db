"""What a router returns in place of a model output when a step could not be computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FailedStep:
    """No token of this step counts. again: its requests are to be computed again, for what failed will be mended before
    the next step; else they are to end with `message`."""

    message: str
    again: bool = False


def output_of_all(outputs: Sequence[Any], output_rank: int) -> Any:
    """The output of a step that several routers computed: the failure of any of them, one that ends the requests before
    others, else output_rank's own."""
    failed = [output for output in outputs if isinstance(output, FailedStep)]
    return min(failed, key=lambda output: output.again) if failed else outputs[output_rank]

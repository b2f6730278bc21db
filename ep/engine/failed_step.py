"""What a router returns in place of a model output when a step could not be computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FailedStep:
    """The step's requests are to end with `message`; no token was sampled."""

    message: str

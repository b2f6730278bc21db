"""Every error that ep raises on purpose, in one tree.

EpError
├── UserError                  a mistake that the user can mend: one line at the CLI, exit code 2
│   ├── ModelError             unknown model, a config.json that no family matches, an unsupported dimension
│   ├── CheckpointError        missing, truncated or mis-shaped tensors
│   ├── PlacementError         a placement that cannot exist (more shards than experts)
│   ├── OptionError            an option or a preset with a wrong value, a port in use, no such Ray cluster
│   └── TraceError             a load trace that is foreign, damaged, too new or empty
├── ClusterError               Ray could not give or keep what was asked (resources, nodes, actors)
└── TransportError             the data plane
    ├── WireError              bytes that are no message of ours
    ├── AuthError              a peer that does not know the cluster's key
    ├── ShardLostError         a shard's connection ended
    ├── ShardFailedError       a shard answered that it could not do what was asked
    └── DeadlineError          a shard did not answer in time

Messages name the path or the option and the values that clash: "PATH: WHAT is VALUE, expected VALUE".
"""

from __future__ import annotations

from typing import Any


class EpError(Exception):
    """Base of every error that ep raises on purpose."""

    exit_code = 1


class UserError(EpError):
    """A mistake that the user can mend."""

    exit_code = 2


class ModelError(UserError):
    """An unknown model or a config that no supported family matches."""


class CheckpointError(UserError):
    """A checkpoint whose files, names or shapes are not what its config promises."""


class PlacementError(UserError):
    """A placement that cannot exist."""


class OptionError(UserError):
    """An option or preset with a value that cannot be used."""


class TraceError(UserError):
    """A load trace that is none, is damaged, comes from a newer version or holds nothing yet."""


class ClusterError(EpError):
    """Ray could not give or keep what was asked of it."""


class TransportError(EpError):
    """The data plane failed. reason: what happened, without the shard's name."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.reason = message


class WireError(TransportError):
    """Bytes that are no message of ours."""


class AuthError(TransportError):
    """A peer that does not know the cluster's key."""


class ShardLostError(TransportError):
    """A shard's connection ended while its answer was awaited."""

    def __init__(self, shard_idx: int, reason: str) -> None:
        super().__init__(f"shard {shard_idx}: {reason}")
        self.shard_idx = shard_idx
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.shard_idx, self.reason))


class ShardFailedError(TransportError):
    """A shard answered that it could not do what was asked; its connection is sound."""

    def __init__(self, shard_idx: int, reason: str) -> None:
        super().__init__(f"shard {shard_idx}: {reason}")
        self.shard_idx = shard_idx
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.shard_idx, self.reason))


class DeadlineError(TransportError):
    """A shard did not answer before the deadline."""

    def __init__(self, shard_idx: int, seconds: float) -> None:
        reason = f"no answer within {seconds:g} s"
        super().__init__(f"shard {shard_idx}: {reason}")
        self.reason = reason
        self.shard_idx = shard_idx
        self.seconds = seconds

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.shard_idx, self.seconds))

"""A router's view of the coordinator: who the shards are, and who replaces one that was lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray

from ep.errors import EpError, ShardLostError, TransportError

if TYPE_CHECKING:
    from ep.transport.base import Endpoint
    from ep.transport.ipc_handles import RouterHandles, ShardHandles


class Membership:
    """Blocking calls to the coordinator, made only at the start and after a loss.

    coordinator: the actor's handle. deadline_s: how long a replacement may take.
    """

    def __init__(self, coordinator: Any, deadline_s: float, start_timeout_s: float) -> None:
        self._coordinator = coordinator
        self._deadline_s = deadline_s
        members = _call(coordinator.members.remote(start_timeout_s))
        self._members = {member.shard_idx: member for member in members}

    def endpoints(self) -> list[Endpoint]:
        """The shards' endpoints in the order of their index."""
        return [self._members[idx].endpoint for idx in sorted(self._members)]

    def attach(self, shard_idx: int, handles: RouterHandles) -> ShardHandles:
        """Introduce a router to a shard of its node. Raises ShardLostError, and what the shard raises."""
        try:
            return _call(self._members[shard_idx].actor.attach.remote(handles))
        except ray.exceptions.RayActorError as error:
            raise ShardLostError(shard_idx, f"it ended before a router met it ({type(error).__name__})") from error

    def replace(self, shard_idx: int, error: TransportError) -> Endpoint:
        """The endpoint of the shard's next incarnation. Raises ShardLostError where none comes up in time."""
        lost = self._members[shard_idx]
        reason, again = error.reason, self._coordinator.replacement
        try:
            member = _call(again.remote(shard_idx, lost.incarnation, reason, self._deadline_s))
        except ray.exceptions.RayActorError as gone:
            raise ShardLostError(shard_idx, f"{reason}; the coordinator is gone ({type(gone).__name__})") from gone
        self._members[shard_idx] = member
        return member.endpoint


def _call(ref: Any) -> Any:
    """ray.get that raises our own errors as themselves."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, EpError):
            raise cause from None
        raise

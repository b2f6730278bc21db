"""Shards that live in routers' processes, where routers and shards share GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from ep.link import NAMESPACE


@dataclass(frozen=True)
class HostedShard:
    """What others call in the place of the shard's actor: its router passes the calls on. It lives as long as that."""

    router_name: str

    def __getattr__(self, name: str) -> _Method:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Method(self.router_name, name)


@dataclass(frozen=True)
class _Method:
    router_name: str
    name: str

    def remote(self, *arguments: Any) -> Any:
        """As of an actor's method. Raises ValueError where there is no such router (yet)."""
        router = ray.get_actor(self.router_name, namespace=NAMESPACE)
        return router.call_hosted.remote(self.name, *arguments)

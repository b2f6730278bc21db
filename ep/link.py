"""What a vLLM process must know to find its router actor: handed from `ep serve` to the processes that vLLM spawns."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

from ep.errors import OptionError

ENV = "EP_LINK"
NAMESPACE = "ep"


@dataclass(frozen=True)
class Link:
    """ray_address: the cluster's address; node_ip: the address by which the starting node is known in it;
    instance: the name that all actors of one `ep serve` share; num_routers: attention ranks."""

    ray_address: str
    node_ip: str
    instance: str
    num_routers: int = 1

    def coordinator_name(self) -> str:
        return f"{self.instance}/coordinator"

    def router_name(self, rank: int) -> str:
        return f"{self.instance}/router-{rank}"

    def shard_name(self, shard_idx: int, incarnation: int) -> str:
        return f"{self.instance}/shard-{shard_idx}.{incarnation}"

    def export(self) -> None:
        """Put the link where the processes that this one spawns will find it."""
        os.environ[ENV] = json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> Link:
        """Raises OptionError where this process was not spawned by `ep serve`."""
        text = os.environ.get(ENV)
        if text is None:
            raise OptionError(f"{ENV} is not set: ep's executor is started by `ep serve`, not by hand")
        return cls(**json.loads(text))

"""Which host each shard goes to: pure. Hosts are Ray nodes, by address; shards of one host are neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

_NO_LIMIT = 1 << 30
_NEARLY = 1e-6
"""Ray counts resources in ten-thousandths."""


@dataclass(frozen=True)
class Host:
    """A Ray node that lives. free: what is left of its resources."""

    address: str
    node_id: str
    free: Mapping[str, float]

    def without(self, taken: Mapping[str, float]) -> Host:
        """With so much less of it free."""
        return replace(self, free={**self.free, **{name: self.free.get(name, 0.0) - taken[name] for name in taken}})

    def room(self, needs: Mapping[str, float]) -> int:
        """How many times `needs` fits."""
        fits = (int(self.free.get(name, 0.0) / amount + _NEARLY) for name, amount in needs.items() if amount)
        return min(fits, default=_NO_LIMIT)


def spread(
    hosts: Sequence[Host], needs: Mapping[str, float], num_shards: int, num_hosts: int | None
) -> list[str] | None:
    """The address for each shard, as evenly as room allows; None where there is not enough.

    hosts: those that come first are taken first. needs: what each shard takes. num_hosts: exactly so many hosts; None
    for all that have room.
    """
    room = {host.address: count for host in hosts if (count := host.room(needs))}
    if num_hosts is not None:
        room = _so_many(room, num_shards, num_hosts)
    if sum(room.values()) < num_shards:
        return None
    taken = dict.fromkeys(room, 0)
    for _ in range(num_shards):
        least = min((address for address in taken if taken[address] < room[address]), key=taken.__getitem__)
        taken[least] += 1
    return [address for address, count in taken.items() for _ in range(count)]


def _so_many(room: Mapping[str, int], num_shards: int, num_hosts: int) -> dict[str, int]:
    """The first num_hosts that have room for an even share; where those have not room for all shards, the ones with
    room for a share that is rounded up. None of them where there are not as many."""
    enough = [address for address, count in room.items() if count >= num_shards // num_hosts]
    roomier_first = sorted(enough, key=lambda address: room[address] < -(-num_shards // num_hosts))
    for chosen in (enough[:num_hosts], roomier_first[:num_hosts]):
        if len(chosen) == num_hosts and sum(room[address] for address in chosen) >= num_shards:
            return {address: room[address] for address in room if address in chosen}
    return {}

"""One MoE layer of a migration: which experts land and which leave in each step. Pure.

A hole is a slot that is EMPTY when a step begins: only there may an expert land. What leaves in a step makes holes for
the next. The last copy of an expert leaves only together with a landing of it, so a hole travels from the shard where
it lands to the shard that gives it up: along the edges of a graph over shards, each used once. By Euler's theorem on
trails the whole graph can be used up if every connected part of it holds a hole, and Fleury's rule (do not cut a part
off from its last hole) finds such an order. A part without a hole is a ring of shards that swap single copies and have
no EMPTY slot: one hole anywhere in it is enough, and without one every order ends in a wait for ever.

The order is always found where there is one. The fewest steps are a scheduling problem without a known fast method: the
landings of a step are chosen greedily, for the shards that lack holes the most.

Shape legend: S shards, E logical experts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ep.errors import PlacementError

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class LayerStep:
    """(expert, shard) pairs that land and that leave in one step."""

    landings: tuple[tuple[int, int], ...]
    departures: tuple[tuple[int, int], ...]


class LayerMigration:
    """What is left to do in one layer.

    held, wanted: bool [S, E], the experts of each shard now and in the end; every expert is on some shard of both.
    holes: EMPTY slots of each shard, at least the number of its wanted experts less the held ones. lost: shards whose
    copies are out of reach: the last copy in reach of an expert that is to land stays until it has.
    Raises PlacementError where no order of the landings exists; then one more hole per shard is always enough.
    """

    def __init__(
        self, layer_pos: int, held: BoolArray, wanted: BoolArray, holes: Sequence[int], lost: Collection[int] = ()
    ) -> None:
        landing, leaving = wanted & ~held, held & ~wanted
        staying = held & wanted
        staying[list(lost)] = False
        self.layer_pos = layer_pos
        self._holes = list(holes)
        self._waiting = [np.flatnonzero(experts).tolist() for experts in landing]
        bound = landing.any(axis=0) & leaving.any(axis=0) & ~staying.any(axis=0)
        self._leaving = [(int(expert), int(shard)) for shard, expert in np.argwhere(leaving & ~bound)]
        self._last_copy: dict[int, int] = {}
        self._targets: dict[int, list[int]] = {}
        givers: dict[int, list[int]] = {}
        for expert in np.flatnonzero(bound).tolist():
            shards = np.flatnonzero(leaving[:, expert]).tolist()
            givers[expert] = [shard for shard in shards if shard not in lost] or shards
            self._targets[expert] = np.flatnonzero(landing[:, expert]).tolist()
            self._leaving += [(expert, shard) for shard in shards if shard not in givers[expert]]
        self._keep_one_copy(givers)

    @property
    def done(self) -> bool:
        return not (self._leaving or any(self._waiting))

    def step(self) -> LayerStep:
        """As many landings as there are holes for; chosen so that the next steps find holes where they need them."""
        chosen = _Choice(self._waiting, self._holes, self._leaving, self._last_copy, self._targets)
        chosen.run(careful=False)
        if chosen.cut_off():
            chosen = _Choice(self._waiting, self._holes, self._leaving, self._last_copy, self._targets)
            chosen.run(careful=True)
        released = [pair for pair in self._last_copy.items() if pair[0] not in chosen.last_copy]
        step = LayerStep(tuple(chosen.landings), (*self._leaving, *released))
        assert step.landings or step.departures
        self._waiting, self._holes, self._last_copy = chosen.waiting, chosen.holes, chosen.last_copy
        self._leaving = []
        return step

    def _keep_one_copy(self, givers: Mapping[int, Sequence[int]]) -> None:
        """Chooses the shard where an expert that moves altogether stays until it has landed; its other copies leave."""
        holes = list(self._holes)
        for _, shard in self._leaving:
            holes[shard] += 1
        for expert, shards in givers.items():
            kept = min(shards, key=lambda shard: (len(self._waiting[shard]) - holes[shard], shard))
            self._last_copy[expert] = kept
            for shard in shards:
                holes[shard] += shard != kept
        while part := _part_without_hole(self._last_copy, self._targets, holes):
            for expert, shard in self._last_copy.items():
                others = [other for other in givers[expert] if other not in part]
                if shard in part and others:
                    self._last_copy[expert] = others[0]
                    holes[shard] += 1
                    holes[others[0]] -= 1
                    break
            else:
                raise PlacementError(
                    f"migration: shards {sorted(part)} only swap single copies in MoE layer {self.layer_pos} and have "
                    "0 empty slots between them; 1 spare slot per shard is needed"
                )
        self._leaving += [
            (expert, shard) for expert, shards in givers.items() for shard in shards if shard != self._last_copy[expert]
        ]


class _Choice:
    """The landings of one step while they are chosen. holes: as they will be when the step is over."""

    def __init__(
        self,
        waiting: Sequence[Sequence[int]],
        holes: Sequence[int],
        leaving: Sequence[tuple[int, int]],
        last_copy: Mapping[int, int],
        targets: Mapping[int, Sequence[int]],
    ) -> None:
        self.waiting = [list(experts) for experts in waiting]
        self.last_copy = dict(last_copy)
        self.landings: list[tuple[int, int]] = []
        self.holes = list(holes)
        for _, shard in leaving:
            self.holes[shard] += 1
        self._room = list(holes)
        self._targets = targets
        self._open_targets = {expert: sum(holes[shard] > 0 for shard in targets[expert]) for expert in last_copy}
        self._takers = [0] * len(holes)
        for expert, giver in last_copy.items():
            self._takers[giver] += self._open_targets[expert] > 0

    def run(self, careful: bool) -> None:
        """careful: no landing may cut shards off from their last hole; otherwise look at `cut_off` afterwards."""
        shards = [shard for shard, room in enumerate(self._room) if room]
        shards.sort(key=lambda shard: self._room[shard] < len(self.waiting[shard]))  # those without a choice first
        while shards:
            for shard in shards:
                if self.waiting[shard]:
                    self._land(self._next(shard, careful), shard)
                self._room[shard] -= 1
                if not self._room[shard]:
                    self._close(shard)
            shards = [shard for shard in shards if self._room[shard] and self.waiting[shard]]

    def cut_off(self) -> set[int]:
        """Shards that will wait for each other for ever."""
        return _part_without_hole(self.last_copy, self._targets, self.holes)

    def _next(self, shard: int, careful: bool) -> int:
        """The expert whose landing gives a hole to the shard that lacks the most; one that gives none comes last."""
        giving = [expert for expert in self.waiting[shard] if expert in self.last_copy]
        if not giving:
            return self.waiting[shard][0]
        if not careful:
            return max(giving, key=self._urgency)
        giving.sort(key=self._urgency, reverse=True)
        return next(expert for expert in giving if not self._cuts_off(expert, shard))

    def _urgency(self, expert: int) -> tuple[int, int, int]:
        """How many more experts wait for the giver of this one than it will have holes; between equals, givers and
        experts that fewer other shards can relieve in this step come first."""
        giver = self.last_copy[expert]
        lack = len(self.waiting[giver]) - self.holes[giver]
        return lack, -self._takers[giver], -len(self._targets[expert])

    def _cuts_off(self, expert: int, shard: int) -> bool:
        last_copy, holes = dict(self.last_copy), list(self.holes)
        holes[last_copy.pop(expert)] += 1
        holes[shard] -= 1
        return bool(_part_without_hole(last_copy, self._targets, holes))

    def _land(self, expert: int, shard: int) -> None:
        self.waiting[shard].remove(expert)
        self.landings.append((expert, shard))
        self.holes[shard] -= 1
        giver = self.last_copy.pop(expert, None)
        if giver is not None:
            self.holes[giver] += 1
            self._takers[giver] -= 1

    def _close(self, shard: int) -> None:
        for expert in self.waiting[shard]:
            if expert in self.last_copy:
                self._open_targets[expert] -= 1
                self._takers[self.last_copy[expert]] -= self._open_targets[expert] == 0


def _part_without_hole(
    last_copy: Mapping[int, int], targets: Mapping[int, Sequence[int]], holes: Sequence[int]
) -> set[int]:
    """A connected part of the graph giver -> targets in which no shard has a hole; empty if there is none."""
    parent = list(range(len(holes)))

    def root(shard: int) -> int:
        while parent[shard] != shard:
            parent[shard] = shard = parent[parent[shard]]
        return shard

    for expert, giver in last_copy.items():
        for target in targets[expert]:
            parent[root(target)] = root(giver)
    alive = {root(shard) for shard, num_holes in enumerate(holes) if num_holes > 0}
    for giver in last_copy.values():
        if (end := root(giver)) not in alive:
            return {shard for shard in range(len(holes)) if root(shard) == end}
    return set()

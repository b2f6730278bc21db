"""Independent tasks over actors of one kind, one task at a time on each. No result is lost when an actor is."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from ep.errors import ClusterError

MAX_TRIES = 2
"""Actors that may end under one task before the task is what is wrong."""


def run_tasks(actors: Sequence[Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """What `actor.run.remote(*task)` gives, for every task, as the results come.

    An actor that ends hands its task to the others. Raises ClusterError, after all results that were under way, for a
    task that raises, one that ended MAX_TRIES actors, and when no actor is left.
    """
    idle, waiting = deque(actors), deque(tasks)
    running: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
    ended: Counter[tuple[Any, ...]] = Counter()
    problem = ""
    while running or (waiting and not problem):
        while waiting and idle and not problem:
            actor, task = idle.popleft(), waiting.popleft()
            running[actor.run.remote(*task)] = (actor, task)
        ready, _ = ray.wait(list(running))
        for reference in ready:
            actor, task = running.pop(reference)
            try:
                result = ray.get(reference)
            except ray.exceptions.RayActorError as error:
                ended[task] += 1
                waiting.append(task)
                if ended[task] == MAX_TRIES:
                    problem = f"task {task} ended {MAX_TRIES} actors: {_last_line(error)}"
                elif not idle and not running:
                    problem = f"no actor is left for {len(waiting)} tasks: {_last_line(error)}"
                continue
            except ray.exceptions.RayError as error:
                problem = f"task {task} failed: {_last_line(error)}"
                continue
            idle.append(actor)
            yield result
    if problem:
        raise ClusterError(problem)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]

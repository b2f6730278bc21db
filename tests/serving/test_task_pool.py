"""Tasks over real Ray actors on faked GPUs: every result once, whatever happens to an actor."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from ep.cluster.task_pool import run_tasks
from ep.errors import ClusterError


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=3, num_gpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class Squarer:
    """Says what it was asked and on which GPU; ends its process, once per marker file, for a task of 13."""

    def run(self, value: int, marker: str) -> tuple[int, str]:
        time.sleep(0.01 * (value % 3))
        if value == 13 and not Path(marker).exists():
            Path(marker).touch()
            os._exit(1)
        if value == 99:
            raise ValueError("99 cannot be measured")
        if value == 666:
            os._exit(1)
        return value * value, os.environ.get("CUDA_VISIBLE_DEVICES", "")


def actors() -> list[ray.actor.ActorHandle]:
    remote = ray.remote(num_gpus=1)(Squarer)
    return [remote.remote() for _ in range(3)]


def test_every_task_is_done_once_on_every_gpu(cluster: None, tmp_path: Path) -> None:
    found = list(run_tasks(actors(), [(value, str(tmp_path / "ended")) for value in range(40)]))
    assert sorted(result for result, _ in found) == [value * value for value in range(40)]
    assert {gpu for _, gpu in found} == {"0", "1", "2"}
    assert (tmp_path / "ended").exists()  # so one actor did end, under task 13


def test_a_task_that_fails_is_named_and_what_ran_beside_it_is_kept(cluster: None, tmp_path: Path) -> None:
    results = []
    with pytest.raises(ClusterError, match="99"):
        for result, _ in run_tasks(actors(), [(value, str(tmp_path)) for value in (2, 99, 5)]):
            results.append(result)
    assert sorted(results) == [4, 25]


def test_a_task_that_ends_its_actors_is_named(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="666"):
        list(run_tasks(actors(), [(value, str(tmp_path)) for value in (1, 666, 2, 3)]))

"""Whether routers that decode come to ask at the same time, and what that costs those that do not.

Time is counted in looks. A router thinks between an answer and its next message; a job that runs takes its time, in
which nobody looks. `take` is the twin, which test_p2p.py compares with the kernel.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import example, given, settings
from hypothesis import strategies as st

from ep.kernels import p2p_layout as layout
from ep.kernels.p2p import CREDIT, JOIN_ROWS, RETRY
from ep.kernels.p2p_reference import take
from tests.unit.p2p_queue import SMALL, Queue

ROWS = 2


@dataclass
class Router:
    """asks_at: when it does next; None while it waits."""

    asks_at: int | None
    layer: int = 0
    seq: int = 0


@dataclass
class Simulation:
    """job_looks: also the window. pause: how long a router thinks before its message for this layer; all are of ROWS.
    met: of each job, how many routers it answered. waited: looks in which there was a message, and none was taken."""

    num_layers: int
    job_looks: int
    pause: Callable[[int], int]
    routers: list[Router]
    whole_rows: int
    met: list[int] = field(default_factory=list)
    waited: int = 0

    def run(self, num_jobs: int) -> None:
        queue = Queue.make(len(self.routers))
        now = 0
        while len(self.met) < num_jobs:
            for idx, router in enumerate(self.routers):
                if router.asks_at is not None and router.asks_at <= now:
                    router.seq, router.asks_at = router.seq + 1, None
                    queue.write(idx, router.seq, ROWS, router.layer, 7, 0b11)
            sizes = (16, 16, 256)
            if not take(
                queue.desk, SMALL, self.num_layers, queue.job, *sizes, 1 << 30, self.job_looks, self.whole_rows
            ):
                self.waited += any(router.asks_at is None for router in self.routers)
                now += 1
                continue
            now += self.job_looks
            ended = queue.job.job[layout.ENDED : layout.ENDED + len(self.routers)].nonzero().flatten().tolist()
            self.met.append(len(ended))
            for idx in ended:
                router = self.routers[idx]
                router.layer = (router.layer + 1) % self.num_layers
                router.asks_at = now + self.pause(router.layer)


@settings(max_examples=30, deadline=None)
@example(num_layers=58, job_looks=4, think=2, between=8, offset=0.5, num_routers=2, whole_rows=1)
@given(
    num_layers=st.integers(1, 7), job_looks=st.integers(4, 16), think=st.integers(1, 4), between=st.integers(1, 40),
    offset=st.floats(0, 1), num_routers=st.integers(2, 3), whole_rows=st.sampled_from([1, 16]),
)  # fmt: skip
def test_routers_that_decode_fall_into_step(
    num_layers: int, job_looks: int, think: int, between: int, offset: float, num_routers: int,
    whole_rows: int,
) -> None:  # fmt: skip
    """Whatever they start with: within four steps all of them are answered by the same jobs."""
    between = min(between, 2 * job_looks)
    step = num_layers * (job_looks + think) + between
    routers = [Router(int(offset * step * idx / (num_routers - 1))) for idx in range(num_routers)]
    simulation = Simulation(num_layers, job_looks, lambda layer: think if layer else between, routers, whole_rows)
    simulation.run((4 * num_routers + 2) * num_layers)
    assert set(simulation.met[-num_layers:]) == {num_routers}


@settings(max_examples=30, deadline=None)
@given(
    num_layers=st.integers(1, 5), job_looks=st.integers(1, 8), longest=st.integers(1, 120), seed=st.integers(0, 999),
    num_routers=st.integers(2, 3), whole_rows=st.sampled_from([1, 16]),
)  # fmt: skip
def test_waiting_takes_no_longer_than_it_has_saved_and_one_credit(
    num_layers: int, job_looks: int, longest: int, seed: int, num_routers: int, whole_rows: int
) -> None:
    """Routers that come whenever they like."""
    pick = random.Random(seed)
    routers = [Router(pick.randrange(longest)) for _ in range(num_routers)]
    simulation = Simulation(num_layers, job_looks, lambda _: pick.randrange(1, longest + 1), routers, whole_rows)
    simulation.run(60)
    each = job_looks * min(2 * ROWS, whole_rows) // whole_rows
    saved = each * sum(met - 1 for met in simulation.met)
    paid_by_itself = len(simulation.met) * -(-each // RETRY)
    assert simulation.waited <= saved + paid_by_itself + CREDIT * job_looks * (num_layers + 2)


def test_messages_of_prompts_are_neither_held_nor_waited_for() -> None:
    assert SMALL.max_tokens < JOIN_ROWS
    for is_prompt in (False, True):
        queue = Queue.make(2)
        queue.write(1, 1, 2, 3, 7, 0b11)
        assert take(queue.desk, SMALL, 4, queue.job, 16, 16, 256, 1, 8, 1)
        assert queue.desk.taken[1, 3] == 0
        if is_prompt:  # what `take` leaves after one
            queue.desk.taken[1, 3] = -1
        queue.write(0, 1, 2, 0, 7, 0b11)
        assert take(queue.desk, SMALL, 4, queue.job, 16, 16, 256, 1, 8, 1) == is_prompt


def test_little_is_held_for_little() -> None:
    """A message of one row, or one that is expected from a router which sends one: where 64 rows read all experts."""
    for ours, theirs in ((1, 12), (12, 1), (12, 12)):
        queue, looks = Queue.make(2), 0
        queue.write(1, 1, theirs, 3, 7, 1)
        assert take(queue.desk, SMALL, 4, queue.job, 16, 16, 256, 1, 8, 64)
        queue.write(0, 1, ours, 0, 7, 1)
        while not take(queue.desk, SMALL, 4, queue.job, 16, 16, 256, 1, 8, 64):
            looks += 1
        half = CREDIT * 8 * (4 + 2) // 2
        assert looks == (half if ours == theirs else half // 8)

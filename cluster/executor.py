"""A vLLM Executor whose workers live in router actors.

    EngineCore ── step queue: scheduler output ──> router actor (vLLM worker)
               <─ step queue: sampled tokens ────

Chosen with `--distributed-executor-backend ep.cluster.executor.RouterExecutor`. Ray starts and watches the routers; a
step's messages go over a StepQueue.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque

import ray
from vllm.logger import init_logger
from vllm.v1.executor.multiproc_executor import FutureWrapper, MultiprocExecutor

from ep.cluster.router_actor import end_routers
from ep.cluster.session import connect
from ep.cluster.step_queue import Broadcast, Rendezvous, StepQueue
from ep.link import NAMESPACE, Link

logger = init_logger(__name__)
_CONNECT_S = 60.0


class RouterExecutor(MultiprocExecutor):
    """MultiprocExecutor with router actors in place of child processes."""

    uses_ray = True
    supports_pp = False

    def _init_executor(self) -> None:
        self._finalizer = weakref.finalize(self, self.shutdown)
        self.is_failed = False
        self.shutting_down = False
        self.failure_callback = None
        link = Link.from_environment()
        connect(link)
        self._get_parallel_sizes()
        self.routers = [ray.get_actor(link.router_name(rank), namespace=NAMESPACE) for rank in range(self.world_size)]
        init_method = ray.get(self.routers[0].init_method.remote())
        rendezvous = Rendezvous()
        self.response_mqs: list[StepQueue] = []
        try:
            # One router after the other, so that the queue at place i is the router of rank i.
            for router in self.routers:
                ray.get(router.connect.remote(rendezvous.path))
                self.response_mqs.append(rendezvous.accept(_CONNECT_S))
        finally:
            rendezvous.close()
        self.rpc_broadcast_mq = Broadcast(self.response_mqs)
        ray.get([router.start.remote(self.vllm_config, init_method) for router in self.routers])
        self._running = [router.run.remote() for router in self.routers]
        self.futures_queue: deque[FutureWrapper] = deque()
        self._post_init_executor()
        self.start_worker_monitor()
        self.output_rank = self._get_output_rank()

    def start_worker_monitor(self, inline: bool = False) -> None:
        """Tell the engine when a router's process ends."""
        self_ref, running = weakref.ref(self), list(self._running)

        def monitor() -> None:
            while True:
                done, _ = ray.wait(running, num_returns=1, timeout=1.0)
                executor = self_ref()
                if executor is None or executor.shutting_down:
                    return
                if done:
                    executor.is_failed = True
                    logger.error("router %d ended", running.index(done[0]))
                    callback, executor.failure_callback = executor.failure_callback, None
                    executor.shutdown()
                    if callback is not None:
                        callback()
                    return

        threading.Thread(target=monitor, daemon=True, name="router-monitor").start()

    def check_health(self) -> None:
        if self.is_failed:
            raise RuntimeError("a router actor ended")

    def shutdown(self) -> None:
        """Stop the routers' loops and close the queues; the actors themselves belong to `ep serve`."""
        if getattr(self, "shutting_down", True):
            return
        self.shutting_down = True
        end_routers(getattr(self, "routers", []))
        for queue in getattr(self, "response_mqs", []):
            queue.shutdown()
        self.response_mqs = []

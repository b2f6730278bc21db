"""A vLLM Executor whose workers live in router actors.

    EngineCore ── step queue: scheduler output ──> router actor (vLLM worker)
               <─ step queue: sampled tokens ────

`ep serve --routers N` has N EngineCores, each with an executor of its own and as many routers as attention has
tensor-parallel ranks: engine e's are those from e x ranks on.
Chosen with `--distributed-executor-backend ep.cluster.executor.RouterExecutor`. Ray starts and watches the routers; a
step's messages go over a StepQueue.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from vllm.logger import init_logger
from vllm.v1.executor.multiproc_executor import FutureWrapper, MultiprocExecutor

from ep.cluster.router_actor import FAILED, end_routers
from ep.cluster.session import connect
from ep.cluster.step_queue import Broadcast, Rendezvous, StepQueue
from ep.engine.failed_step import FailedStep, output_of_all
from ep.engine.independent import as_only_engine, engine_index
from ep.link import NAMESPACE, Link

logger = init_logger(__name__)
_CONNECT_S = 60.0
_TELL_S = 5.0


class _StepOutputs:
    """vLLM's place for what reads the outputs of all workers of a step: here whether one of them failed.

    connector: vLLM's own aggregator, where a KV connector is used.
    """

    def __init__(self, connector: Any) -> None:
        self._connector = connector

    def aggregate(self, outputs: Sequence[Any], output_rank: int = 0) -> Any:
        found = output_of_all(outputs, output_rank)
        if self._connector is None or isinstance(found, FailedStep):
            return found
        return self._connector.aggregate(outputs, output_rank)


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
        first = engine_index(self.vllm_config) * self.parallel_config.world_size
        as_only_engine(self.vllm_config)
        self._get_parallel_sizes()
        self.ranks = range(first, first + self.world_size)
        self._coordinator = ray.get_actor(link.coordinator_name(), namespace=NAMESPACE)
        self.routers = [ray.get_actor(link.router_name(rank), namespace=NAMESPACE) for rank in self.ranks]
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
        if self.world_size > 1:
            self.kv_output_aggregator = _StepOutputs(None)

    def init_kv_output_aggregator(self, connector: Any) -> None:
        super().init_kv_output_aggregator(connector)
        if self.world_size > 1:
            self.kv_output_aggregator = _StepOutputs(self.kv_output_aggregator)

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
                    executor._report_end(executor.ranks[running.index(done[0])], done[0])
                    callback, executor.failure_callback = executor.failure_callback, None
                    executor.shutdown()
                    if callback is not None:
                        callback()
                    return

        threading.Thread(target=monitor, daemon=True, name="router-monitor").start()

    def _report_end(self, rank: int, run: Any) -> None:
        """Leave word with the coordinator of which router ended, and why."""
        try:
            ray.get(run)
            reason = "its loop ended"
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines()
            reason = lines[-1].strip() if isinstance(error, ray.exceptions.RayTaskError) else "its process died"
        logger.error("router %d ended: %s", rank, reason)
        with suppress(ray.exceptions.RayError):
            ray.get(self._coordinator.set_phase.remote(rank, f"{FAILED}router {rank} ended: {reason}"), timeout=_TELL_S)

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

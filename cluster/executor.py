"""A vLLM Executor whose workers live in router actors.

    EngineCore ── shared-memory queue: one message per step ──> router actor (vLLM worker)
               <─ shared-memory queue: sampled tokens ─────────

Chosen with `--distributed-executor-backend ep.cluster.executor.RouterExecutor`. Ray starts and watches the routers; a
step's messages go over vLLM's own MessageQueue. The queues block instead of spinning: on a CPU host the cycles belong
to the shards.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque

import ray
import vllm.envs as envs
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.logger import init_logger
from vllm.v1.executor.multiproc_executor import FutureWrapper, MultiprocExecutor

from ep.cluster.session import connect
from ep.link import NAMESPACE, Link

logger = init_logger(__name__)


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
        self.rpc_broadcast_mq = MessageQueue(
            self.world_size,
            self.world_size,
            max_chunk_bytes=envs.VLLM_MQ_MAX_CHUNK_BYTES_MB * 1024 * 1024,
            connect_ip=link.node_ip,
        )
        handle = self.rpc_broadcast_mq.export_handle()
        init_method = ray.get(self.routers[0].init_method.remote())
        replies = ray.get(
            [
                router.start.remote(self.vllm_config, rank, handle, init_method)
                for rank, router in enumerate(self.routers)
            ]
        )
        self.response_mqs = [MessageQueue.create_from_handle(reply, 0) for reply in replies]
        for queue in self.response_mqs:
            block_on_read(queue)
        self._running = [router.run.remote() for router in self.routers]
        self.rpc_broadcast_mq.wait_until_ready()
        for queue in self.response_mqs:
            queue.wait_until_ready()
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
        for router in getattr(self, "routers", []):
            ray.kill(router)
        queues = [getattr(self, "rpc_broadcast_mq", None), *getattr(self, "response_mqs", [])]
        for queue in queues:
            if queue is not None:
                queue.shutdown()
        self.rpc_broadcast_mq, self.response_mqs = None, []


def block_on_read(queue: MessageQueue) -> None:
    """Make a queue's reader sleep until it is notified, where it would spin for a second after every message."""
    condition = getattr(queue, "_spin_condition", None)
    if condition is not None:
        condition.busy_loop_s = 0

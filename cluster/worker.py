"""vLLM's worker process loop, run inside a router actor."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.executor.multiproc_executor import WorkerProc

from ep.cluster.step_queue import StepQueue
from ep.engine.failed_step import FailedStep
from ep.errors import TransportError

logger = init_logger(__name__)


class RouterWorker(WorkerProc):
    """A WorkerProc whose steps fail alone: when the data plane gives up, the step's requests end, not the engine."""

    def __init__(self, steps: StepQueue, **options: Any) -> None:
        self._steps = steps
        super().__init__(input_shm_handle=None, **options)
        execute_model = self.worker.execute_model

        def execute_or_fail(*args: Any, **kwargs: Any) -> Any:
            try:
                return execute_model(*args, **kwargs)
            except TransportError as error:
                logger.error("step failed: %s", error)
                return FailedStep(str(error))

        self.worker.execute_model = execute_or_fail

    def _init_message_queues(self, *_: Any) -> None:
        self.rpc_broadcast_mq = self.worker_response_mq = self._steps
        self.peer_response_handles: list[dict] = []

    def serve(self) -> None:
        """Serve the executor's calls until its queue is closed."""
        try:
            self.worker_busy_loop()
        except EOFError:
            logger.info("the executor is gone")

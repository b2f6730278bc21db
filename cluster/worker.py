"""vLLM's worker process loop, run inside a router actor."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.executor.multiproc_executor import WorkerProc

from ep.cluster.executor import block_on_read
from ep.engine.failed_step import FailedStep
from ep.errors import TransportError

logger = init_logger(__name__)


class RouterWorker(WorkerProc):
    """A WorkerProc whose steps fail alone: when the data plane gives up, the step's requests end, not the engine."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        execute_model = self.worker.execute_model

        def execute_or_fail(*args: Any, **kwargs: Any) -> Any:
            try:
                return execute_model(*args, **kwargs)
            except TransportError as error:
                logger.error("step failed: %s", error)
                return FailedStep(str(error))

        self.worker.execute_model = execute_or_fail
        block_on_read(self.rpc_broadcast_mq)

    def serve(self) -> None:
        """Serve the executor's calls until its queue is closed."""
        self.rpc_broadcast_mq.wait_until_ready()
        self.worker_response_mq.wait_until_ready()
        self.worker_busy_loop()

"""vLLM's worker process loop, run inside a router actor."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.executor.multiproc_executor import WorkerProc
from vllm.v1.outputs import AsyncModelRunnerOutput

from ep.cluster.step_queue import StepQueue
from ep.engine.failed_step import FailedStep
from ep.engine.first_runs import run_sampling
from ep.engine.ops import bound_router
from ep.errors import TransportError

if TYPE_CHECKING:
    from ep.engine.ops import AnyRouter

logger = init_logger(__name__)


class RouterWorker(WorkerProc):
    """A WorkerProc whose steps fail alone: when the data plane gives up, the step's requests end, not the engine."""

    def __init__(self, steps: StepQueue, between_steps: threading.RLock, vllm_config: Any, **options: Any) -> None:
        self._steps = steps
        super().__init__(input_shm_handle=None, vllm_config=vllm_config, **options)
        execute_model, sample_tokens = self.worker.execute_model, self.worker.sample_tokens
        warm_up = self.worker.compile_or_warm_up_model
        router = bound_router()
        self._unsampled = False
        self._step = 0
        # The engine fills a grammar's mask in between the two halves of a step, or runs ahead of them: else one call
        # does both, and the engine is woken once a step.
        at_once = not vllm_config.scheduler_config.async_scheduling

        def execute_or_fail(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            if self._unsampled:  # another router of this engine could not compute the step before
                sample(None)
            try:
                sizes = scheduler_output.num_scheduled_tokens.values()
                num_decode = sum(size == 1 for size in sizes) if self._puts_decode_first() else None
                num_tokens = scheduler_output.total_num_scheduled_tokens
                with between_steps, router.step(num_tokens, len(sizes), num_decode) as self._step:
                    output = execute_model(scheduler_output, *args, **kwargs)
            except TransportError as error:
                logger.error("step failed: %s", error)
                sample_tokens(None)  # of a step that went on beside others; else there is nothing to sample
                return FailedStep(str(error))
            if output is None and at_once and not getattr(scheduler_output, "has_structured_output_requests", True):
                return sample(None)
            self._unsampled = output is None
            return output

        def sample(grammar_output: Any) -> Any:
            self._unsampled = False
            output = sample_tokens(grammar_output)
            if isinstance(output, AsyncModelRunnerOutput):
                return _AsyncOutput(output, router, self._step)
            return _or_failure(output, router, self._step)

        def warm_up_all() -> Any:
            result = warm_up()
            run_sampling(self.worker.model_runner)
            return result

        self.worker.execute_model, self.worker.sample_tokens = execute_or_fail, sample
        self.worker.compile_or_warm_up_model = warm_up_all

    def _puts_decode_first(self) -> bool:
        """Whether this model's attention has requests with one token before all others in a batch."""
        runner = getattr(self.worker, "model_runner", None)
        return getattr(runner, "reorder_batch_threshold", None) is not None

    def _init_message_queues(self, *_: Any) -> None:
        self.rpc_broadcast_mq = self.worker_response_mq = self._steps
        self.peer_response_handles: list[dict] = []

    def serve(self) -> None:
        """Serve the executor's calls until its queue is closed."""
        try:
            self.worker_busy_loop()
        except EOFError:
            logger.info("the executor is gone")


class _AsyncOutput(AsyncModelRunnerOutput):
    """Asks the router when the device is done with the step."""

    def __init__(self, output: AsyncModelRunnerOutput, router: AnyRouter, step: int) -> None:
        self._output, self._router, self._step = output, router, step

    def get_output(self) -> Any:
        return _or_failure(self._output.get_output(), self._router, self._step)


def _or_failure(output: Any, router: AnyRouter, step: int) -> Any:
    """The output of a step that the device is done with, unless its router says that it was not whole."""
    failure = router.failure(step)
    if failure is None:
        return output
    logger.error("step failed%s: %s", ", to be computed again" if failure.again else "", failure.error)
    return FailedStep(str(failure.error), failure.again)

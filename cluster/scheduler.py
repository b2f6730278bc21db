"""vLLM's schedulers, taught to end the requests of a failed step instead of the whole engine."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from ep.engine.failed_step import FailedStep


class _EndsFailedSteps(Scheduler):
    """A vLLM scheduler that knows a FailedStep."""

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        if not isinstance(model_runner_output, FailedStep):
            return super().update_from_output(scheduler_output, model_runner_output)
        requests = []
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            request = self.requests.get(request_id)
            if request is None or request.is_finished():
                continue
            if hasattr(request, "num_in_flight_tokens"):
                request.num_in_flight_tokens -= num_tokens
            requests.append(request)
        # Blocks were entered into the prefix cache when they were allocated, but this step never filled them.
        blocks = {
            block
            for request in requests
            for group in self.kv_cache_manager.get_block_ids(request.request_id)
            for block in group
        }
        self.kv_cache_manager.evict_blocks(blocks)
        self.finish_requests([r.request_id for r in requests], RequestStatus.FINISHED_ERROR)
        outputs: dict[int, list[EngineCoreOutput]] = {}
        for request in requests:
            outputs.setdefault(request.client_index, []).append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    stop_reason=model_runner_output.message,
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        return {client: EngineCoreOutputs(outputs=of_client) for client, of_client in outputs.items()}


class RouterScheduler(_EndsFailedSteps):
    """For platforms that schedule a step after the one before has ended."""


class AsyncRouterScheduler(_EndsFailedSteps, AsyncScheduler):
    """For platforms that schedule a step while the one before runs."""

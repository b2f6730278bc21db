"""vLLM's schedulers, taught to repeat a failed step or to end its requests, instead of ending the whole engine."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from ep.engine.failed_step import FailedStep

_DROPS_STALE = "drop_stale_output" in inspect.signature(Scheduler._preempt_request).parameters
"""Since vLLM 0.32."""


class _KnowsFailedSteps(Scheduler):
    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        if not isinstance(model_runner_output, FailedStep):
            return super().update_from_output(scheduler_output, model_runner_output)
        requests = self._take_back(scheduler_output.num_scheduled_tokens)
        # Blocks were entered into the prefix cache when they were allocated, but this step never filled them.
        blocks = {
            block
            for request in requests
            for group in self.kv_cache_manager.get_block_ids(request.request_id)
            for block in group
        }
        self.kv_cache_manager.evict_blocks(blocks)
        if model_runner_output.again:
            self._repeat(requests, scheduler_output.num_scheduled_tokens)
            return {}
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

    def _take_back(self, sizes: Mapping[str, int]) -> list[Any]:
        """The step's requests that have not ended. sizes: tokens of each."""
        found = []
        for request_id, num_tokens in sizes.items():
            request = self.requests.get(request_id)
            if request is not None and not request.is_finished():
                if hasattr(request, "num_in_flight_tokens"):
                    request.num_in_flight_tokens -= num_tokens
                found.append(request)
        return found

    def _repeat(self, requests: list[Any], sizes: Mapping[str, int]) -> None:
        """What the step was to compute is still to be computed."""
        raise NotImplementedError


class RouterScheduler(_KnowsFailedSteps):
    """For platforms that schedule a step after the one before has ended."""

    def _repeat(self, requests: list[Any], sizes: Mapping[str, int]) -> None:
        # Their blocks are still theirs; the same values are written to them again.
        for request in requests:
            request.num_computed_tokens -= sizes[request.request_id]


class AsyncRouterScheduler(_KnowsFailedSteps, AsyncScheduler):
    """For platforms that schedule a step while the one before runs, whose tokens it may build upon without having seen
    them: after a failure nothing that is under way counts."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._under_way: Counter[str] = Counter()
        """Steps of each request that have been scheduled and have not come back."""
        self._void: Counter[str] = Counter()
        """Those of them, the next ones, that come back for nothing."""

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        super()._update_after_schedule(scheduler_output)
        self._under_way.update(scheduler_output.num_scheduled_tokens.keys())

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        sizes = scheduler_output.num_scheduled_tokens
        if not (_DROPS_STALE or isinstance(model_runner_output, FailedStep)):
            for request_id in sizes.keys() & self._void.keys():
                model_runner_output.sampled_token_ids[model_runner_output.req_id_to_index[request_id]] = []
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for counter in (self._under_way, self._void):
            for request_id in sizes.keys() & counter.keys():
                counter[request_id] -= 1
                if counter[request_id] <= 0:
                    del counter[request_id]
        return outputs

    def _take_back(self, sizes: Mapping[str, int]) -> list[Any]:
        requests = super()._take_back(sizes)
        for request in requests if _DROPS_STALE else ():
            stale = request.num_stale_output_tokens
            request.num_stale_output_tokens = max(stale - sizes[request.request_id], 0)
        return [request for request in requests if request.request_id not in self._void]

    def _repeat(self, requests: list[Any], sizes: Mapping[str, int]) -> None:
        """As vLLM where it throws the KV cache of running requests away: what they have said stays said, all of it is
        computed anew."""
        now = time.monotonic()
        for request in reversed(requests):  # each goes before the others
            self._void[request.request_id] = self._under_way[request.request_id]  # this step among them
            if request.status == RequestStatus.RUNNING:
                self.running.remove(request)
                if _DROPS_STALE:
                    self._preempt_request(request, now, drop_stale_output=True)
                else:
                    self._preempt_request(request, now)
            elif _DROPS_STALE:
                request.drop_stale_output = True
            if not _DROPS_STALE:
                request.num_output_placeholders = 0
        self.prev_step_scheduled_req_ids.clear()

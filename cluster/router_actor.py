"""The Ray actor around a vLLM worker: attention, gating, dispatch and combine of one attention rank.

Ray carries the start; steps arrive over a StepQueue and are computed by a thread of their own, so that control
calls are answered while a step runs.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ep import __version__
from ep.cluster.gpus import claim
from ep.cluster.session import restore_priority
from ep.cluster.shard_actor import ShardActor, ShardSetup
from ep.cluster.step_queue import StepQueue
from ep.errors import ClusterError, TraceError
from ep.link import NAMESPACE, Link
from ep.share import Share

if TYPE_CHECKING:
    from ep.cluster.data_plane import DataPlane
    from ep.cluster.recording import Recording
    from ep.ipc_options import IpcOptions
    from ep.load import PlacementChange
    from ep.recorder import RecentLoad

_END_TRACE_S = 2.0
HOSTED_SWITCH_S = 5e-5
"""How long the router's thread may keep the interpreter from that of a shard in its process, for which others wait."""

FAILED = "failed: "
"""How the phase of a router starts that could not."""


@dataclass(frozen=True)
class RouterSetup:
    """deadline_s: how long a round trip, a restart of a shard included, may take before the step's requests fail.

    rank: among all routers of the instance. on_gpu: whether attention, and slots in this process, are computed by a
    GPU. hosts: of the shards, empty with all of them in this process. ipc: None for other transports; hosted: the shard
    that lives in this process, if one does. model: its name. trace: path of the file that load is recorded in, None to
    record nothing.
    """

    link: Link
    rank: int
    model: str
    checkpoint: str
    placement: dict[str, Any]
    transport: str
    hosts: tuple[str, ...]
    on_gpu: bool
    dispatch_dtype: str
    combine_dtype: str
    ipc: IpcOptions | None
    hosted: ShardSetup | None
    deadline_s: float
    start_timeout_s: float
    num_threads: int
    key: bytes
    fp8: bool | None
    environment: dict[str, str]
    trace: str | None
    trace_window_s: float


class RouterActor:
    """One router's process."""

    def __init__(self, setup: RouterSetup) -> None:
        # Read when torch and vLLM are imported, which is why both are imported below.
        os.environ.update(setup.environment)
        os.environ["OMP_NUM_THREADS"] = str(setup.num_threads)
        restore_priority()
        if setup.hosted is not None:
            sys.setswitchinterval(HOSTED_SWITCH_S)
        self._setup = setup
        self._data_plane: DataPlane | None = None
        self._hosted = ShardActor(setup.hosted, own_process=False) if setup.hosted is not None else None
        self._worker: Any = None
        self._steps: StepQueue | None = None
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="router").start()
        self._jobs.put((self._import_vllm, Future()))

    def init_method(self) -> str:
        """The rendezvous of torch.distributed among the routers of one engine."""
        from vllm.utils import network_utils as network

        if hasattr(network, "get_file_store_init_method"):
            return str(network.get_file_store_init_method())
        return str(network.get_distributed_init_method(network.get_loopback_ip(), network.get_open_port()))

    def connect(self, path: str) -> None:
        """Connect to the executor's rendezvous."""
        self._steps = StepQueue.connect(path)

    def start(self, vllm_config: Any, init_method: str) -> None:
        """Build the router and vLLM's worker, load the weights."""
        try:
            self._call(lambda: self._start(vllm_config, init_method))
        except Exception as error:
            self._phase(f"{FAILED}{error}")
            raise

    def run(self) -> None:
        """Serve steps until the queue is closed; its end tells the executor that this router is gone."""
        self._call(self._serve)

    def call_hosted(self, method: str, *arguments: Any) -> Any:
        """A call of the shard that lives in this process (ShardActor)."""
        assert self._hosted is not None, "no shard lives here"
        return getattr(self._hosted, method)(*arguments)

    def adopt(self, placement: dict[str, Any]) -> None:
        """Route by this placement from the next step on."""
        from ep.placement import Placement

        assert self._data_plane is not None, "start comes before adopt"
        self._data_plane.adopt(Placement.from_dict(placement))

    def status(self) -> dict[str, Any]:
        """Counters of the router's data plane."""
        base = {"rank": self._setup.rank, "pid": os.getpid()}
        return base | (self._data_plane.status() if self._data_plane is not None else {})

    def metrics(self) -> dict[str, Any] | None:
        """For Prometheus; None while the router starts."""
        return self._data_plane.metrics() if self._data_plane is not None else None

    def trace_bytes(self) -> bytes:
        """The trace's file, what is counted until now included. Raises ClusterError, TraceError."""
        return self._recording().trace_bytes()

    def loads(self, seconds: float) -> RecentLoad:
        """What was counted in about the last `seconds` seconds. Raises ClusterError, TraceError."""
        return self._recording().loads(seconds)

    def note_change(self, change: PlacementChange) -> None:
        """Append a change of the placement to the trace, if there is one."""
        recording = self._opened().recording
        if recording is not None:
            recording.note_change(change)

    def end_trace(self) -> None:
        """Write what is counted until now: this process is about to be ended."""
        if self._data_plane is not None and self._data_plane.recording is not None:
            self._data_plane.recording.close()

    def _opened(self) -> DataPlane:
        if self._data_plane is None:
            raise ClusterError(f"router {self._setup.rank} is still starting")
        return self._data_plane

    def _recording(self) -> Recording:
        recording = self._opened().recording
        if recording is None:
            raise TraceError(f"{self._setup.link.instance}: no load is recorded (ep serve --trace none)")
        return recording

    def _call(self, job: Any) -> Any:
        future: Future = Future()
        self._jobs.put((job, future))
        return future.result()

    def _work(self) -> None:
        while True:
            job, future = self._jobs.get()
            try:
                future.set_result(job())
            except BaseException as error:  # handed to the caller, whatever it is
                future.set_exception(error)

    def _import_vllm(self) -> None:
        """The longest part of a start: done while the shards load and the engine is built."""
        self._phase("importing vLLM")
        import vllm.v1.executor.multiproc_executor  # noqa: F401

    def _start(self, vllm_config: Any, init_method: str) -> None:
        import torch
        import vllm
        from vllm.plugins import load_general_plugins

        from ep.cluster.data_plane import open_data_plane
        from ep.cluster.worker import RouterWorker
        from ep.engine.ops import bind_router
        from ep.group_router import GroupRouter
        from ep.router import Router

        _configure_logging(vllm_config)
        load_general_plugins()
        self._phase("waiting for the shards")
        versions = {"ep": __version__, "vllm": vllm.__version__, "torch": torch.__version__}
        group_size = vllm_config.parallel_config.world_size
        rank = self._setup.rank % group_size
        share = Share(rank, group_size)
        claim(rank)  # where vLLM's worker of this rank looks for its GPU
        self._data_plane = open_data_plane(
            self._setup, vllm_config.scheduler_config.max_num_batched_tokens, versions, share, self._hosted
        )
        router = self._data_plane.router
        bind_router(GroupRouter(router, share) if group_size > 1 and isinstance(router, Router) else router)
        self._phase("loading attention weights")
        assert self._steps is not None, "connect comes before start"
        self._worker = RouterWorker(
            self._steps,
            self._data_plane.between_steps,
            vllm_config=vllm_config,
            local_rank=rank,
            rank=rank,
            distributed_init_method=init_method,
            shared_worker_lock=threading.Lock(),
            is_driver_worker=rank == 0,
        )
        self._phase("warming up")

    def _serve(self) -> None:
        try:
            self._worker.serve()
        finally:
            assert self._data_plane is not None
            self._data_plane.close()

    def _phase(self, phase: str) -> None:
        import ray

        coordinator = ray.get_actor(self._setup.link.coordinator_name(), namespace=NAMESPACE)
        coordinator.set_phase.remote(self._setup.rank, phase)


def end_routers(routers: Sequence[Any]) -> None:
    """End the processes of these actors, once their traces are written."""
    import ray

    if not ray.is_initialized():  # at the end of an engine's process, and the first call would start a Ray of its own
        return
    with suppress(ray.exceptions.RayError):  # one that is gone, or that hangs, writes no more
        ray.get([router.end_trace.remote() for router in routers], timeout=_END_TRACE_S)
    for router in routers:
        ray.kill(router)


def _configure_logging(vllm_config: Any) -> None:
    """Newer vLLM carries its logging settings in the config and leaves it to each process to apply them."""
    from vllm import logger

    if hasattr(logger, "configure_logging") and hasattr(vllm_config, "logging_config"):
        logger.configure_logging(vllm_config.logging_config)

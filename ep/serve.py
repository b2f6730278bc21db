"""`ep serve MODEL`: Ray, shards, routers and vLLM's OpenAI server, from nothing to answering."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ep.announce import announce
from ep.cluster.router_actor import FAILED
from ep.devices import count_gpus, serves_on_gpu
from ep.errors import ClusterError, OptionError
from ep.serve_options import ServeOptions, check, check_memory, num_hosted, resolved
from ep.target import Target, resolve_target
from ep.terminal import Terminal, state_dir
from ep.trace_path import check_trace, trace_path
from ep.vllm_flags import check_free, check_supported, tensor_parallel_size, vllm_flags

if TYPE_CHECKING:
    from ep.cluster.launch import Launch

_HARDWARE_QUEUES = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "GPU_MAX_HW_QUEUES": "16"}
"""CUDA's and HIP's names. Two streams that share a queue wait for each other, also for a kernel that waits itself."""


def serve(options: ServeOptions) -> None:
    """Run until Ctrl-C or SIGTERM. Raises UserError for what the user can mend, ClusterError for Ray's failures."""
    terminal = Terminal(options.verbose)
    signal.signal(signal.SIGTERM, _interrupt)
    _check_port(options.host, options.port)
    check_free(options.vllm_flags)
    num_routers = options.routers * tensor_parallel_size(options.vllm_flags)
    check_trace(options.trace, num_routers)
    target = resolve_target(options.model, options.checkpoint, options.synthetic, terminal, options.layers)
    # Mistakes are told before a cluster is joined, which may have more GPUs than this machine.
    alone = resolved(options, target.spec.num_experts, count_gpus() if serves_on_gpu() else 0)
    check(alone if options.shards is not None else replace(alone, nodes=None), target, num_routers)
    with terminal.quiet("serve"):
        try:
            _serve(options, alone, target, terminal)
        except KeyboardInterrupt:
            terminal.say("stopping")
        finally:
            _ignore_signals()
            _end_ray()
    terminal.say("stopped: no process left")


def _serve(options: ServeOptions, alone: ServeOptions, target: Target, terminal: Terminal) -> None:
    """alone: the options as they were resolved without a cluster."""
    # An engine that is forked has this process's connection to Ray without the threads that serve it.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    vllm = _InBackground(_import_server)
    from ep.cluster import session as sessions
    from ep.cluster.launch import Launch, LaunchOptions
    from ep.cluster.rebalancer import RebalanceOptions
    from ep.metrics import ClusterMetrics

    terminal.say("starting: Ray and vLLM")
    address = options.address
    if address in (None, "auto"):
        address = sessions.find_started()
        if address is None and options.address == "auto":
            raise OptionError("--address auto: `ray start` has made no cluster on this machine")
    assert alone.shards is not None
    needed = int(alone.shards * options.shard_cpus + 0.999)
    session = sessions.join_or_start(None if address == "local" else address, max(os.cpu_count() or 1, needed))
    signal.signal(signal.SIGTERM, _interrupt)  # Ray has put a handler of its own there
    terminal.say(f"{'started a local Ray' if session.started else 'joined the Ray cluster'} at {session.address}")
    on_gpu = serves_on_gpu()
    num_gpus = sessions.cluster_gpus(session.node_id, options.nodes) if on_gpu else 0
    options = resolved(options, target.spec.num_experts, num_gpus)
    ranks = tensor_parallel_size(options.vllm_flags)
    placement = check(options, target, options.routers * ranks)
    if not on_gpu:
        check_memory(target.spec, placement, options, sessions.cluster_memory())
    instance = f"{target.name.rstrip('/').rsplit('/', 1)[-1]}-{secrets.token_hex(3)}"
    trace = trace_path(options.trace, instance)
    launch = Launch(
        session,
        LaunchOptions(
            instance=instance,
            model=target.name,
            checkpoint=str(target.checkpoint),
            placement=placement,
            transport=options.transport,
            dispatch_dtype=options.dispatch_dtype,
            combine_dtype=options.combine_dtype,
            fp8=True if options.expert_dtype == "fp8" else None,
            deadline_s=options.deadline_s,
            wait_s=options.wait_s,
            shard_threads=options.shard_threads,
            shard_cpus=options.shard_cpus,
            num_hosts=options.nodes,
            on_gpu=on_gpu,
            shard_gpus=options.shard_gpus if on_gpu else 0.0,
            router_gpus=options.router_gpus if on_gpu else 0.0,
            num_routers=options.routers * ranks,
            num_hosted=num_hosted(options, placement.num_shards, options.routers * ranks, num_gpus),
            router_threads=options.router_threads,
            router_environment=_router_environment(),
            rebalance=RebalanceOptions(
                options.redundant, options.auto_rebalance and trace is not None, options.rebalance_interval_s
            ),
            trace=None if trace is None else str(trace),
            trace_window_s=options.trace_window_s,
        ),
    )
    try:
        # Shards, router and server import and load at the same time: each waits for the others only where it must.
        launch.start(on_wait=terminal.say)
        server = vllm.result()
        cpu = server.is_cpu()
        door = (options.host, options.port, options.api_key)
        args = server.parse_flags(vllm_flags(target, *door, options.routers, options.vllm_flags, cpu))
        if on_gpu and (launch.needs_host or launch.options.num_hosted):
            server.split_at_experts(args, whole_steps=not launch.needs_host)
        check_supported(args, options.routers, ranks)
        launch.link.export()
        file = metrics_file(instance) if (args.api_server_count or 1) > 1 else None
        metrics = ClusterMetrics(launch.metrics, file=file)
        metrics.start()
        ended = threading.Event()
        announcing = threading.Thread(target=announce, args=(options, launch, terminal, ended), daemon=True)
        announcing.start()
        try:
            server.run(args, file)
        except Exception as error:
            if launch.has_failed_shard():
                launch.wait_for_shards()
            server.blame_flags(error)
            raise ClusterError(f"the engine ended: {_root_cause(launch, error)}{_see_log(terminal)}") from error
        else:
            if failures := _failures(launch):  # vLLM's server then ends as if it had been asked to
                raise ClusterError(f"{failures[0]}{_see_log(terminal)}")
        finally:
            ended.set()
            metrics.stop()
            announcing.join()
    finally:
        _ignore_signals()
        launch.close()


def metrics_file(instance: str) -> Path:
    """Where the cluster's metrics are for API servers in processes of their own."""
    folder = state_dir() / "metrics"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{instance}.prom"


def _root_cause(launch: Launch, error: Exception) -> str:
    """What a router said before it gave up; else the engine's own words."""
    return (_failures(launch) or [f"{type(error).__name__}: {error}".strip().splitlines()[-1]])[0]


def _failures(launch: Launch) -> list[str]:
    """The last line of what each router that is gone left behind."""
    said = launch.progress()["routers"].values()
    return [phase.removeprefix(FAILED).strip().splitlines()[-1] for phase in said if phase.startswith(FAILED)]


def _see_log(terminal: Terminal) -> str:
    return f" (log: {terminal.log})" if terminal.log is not None else ""


def _router_environment() -> dict[str, str]:
    """What a router's process must share with this one; a joined cluster's workers have `ray start`'s environment."""
    prefixes = ("VLLM_", "HF_", "TORCHINDUCTOR_", "TRANSFORMERS_", *_HARDWARE_QUEUES)
    shared = {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
    # vLLM 0.32 cannot load back what it compiled ahead of time on CPU; torch's own cache serves later starts instead.
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_USE_AOT_COMPILE": "0"} | _HARDWARE_QUEUES | shared


def _import_server() -> Any:
    from ep.engine import server

    return server


class _InBackground:
    """A call that runs in a thread of its own, its result or error given back by `result`."""

    def __init__(self, call: Any) -> None:
        self._outcome: list[Any] = []
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Any) -> None:
        try:
            self._outcome = [call(), None]
        except BaseException as error:  # raised again in the caller's thread
            self._outcome = [None, error]

    def result(self) -> Any:
        while self._thread.is_alive():
            self._thread.join(0.2)  # in slices, so that a signal is handled meanwhile
        value, error = self._outcome
        if error is not None:
            raise error
        return value


def _check_port(host: str, port: int) -> None:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise OptionError(f"--host {host} --port {port}: cannot listen there: {error}") from None


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    """From here on everything is being ended anyway; a second Ctrl-C must not leave half of it behind."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end_ray() -> None:
    """Leave the cluster; ends the Ray processes if this one started them."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()

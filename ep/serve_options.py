"""The options of `ep serve`, and what it decides by them before anything starts. No I/O."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ep.errors import OptionError, PlacementError
from ep.model import ModelSpec
from ep.placement import Placement, even_split, with_spares
from ep.planning.plan import plan
from ep.planning.request import PlanRequest

if TYPE_CHECKING:
    from ep.target import Target

IPC_SHARDS = 64
"""That ipc reaches at most (kernels/p2p.py `supports`)."""


@dataclass(frozen=True)
class ServeOptions:
    """The options of `ep serve`; vllm_flags are passed on to vLLM's own parser.

    layers: with synthetic, so many layers of the published shapes, their weights made on the devices that hold them.
    address: None joins the cluster that `ray start` made on this machine and starts a local one where there is none;
    "local" always starts one. nodes: of the cluster, that the shards are spread over; None for all that have room.
    shard_cpus, shard_threads and shard_gpus are per shard, router_gpus per router; GPUs are asked for where vLLM
    computes on them. deadline_s bounds a layer's round trip, the restart of a lost shard included. expert_dtype: auto
    keeps an FP8 checkpoint's experts FP8 on GPUs and dequantises them to bf16 on CPUs, fp8 keeps them FP8 there too.
    redundant: replicas per layer beyond one slot for each expert.
    routers: engines with attention and KV cache of their own behind the one server; each is as many router actors as
    vLLM's --tensor-parallel-size says. spare_slots: empty slots per shard and layer that a rebalance moves into, by
    default one for every 16.
    transport: auto is ipc on GPUs, else socket. share_gpus: with ipc, as many shards as there are routers live in the
    routers' processes; None: only those for which there is no GPU left. trace: new file that load is recorded in,
    "none" for none, None for one in the state folder. check: end as soon as a first token has come back.
    """

    model: str
    checkpoint: str | None = None
    synthetic: bool = False
    layers: int | None = None
    shards: int | None = None
    nodes: int | None = None
    address: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    transport: str = "auto"
    share_gpus: bool | None = None
    dispatch_dtype: str = "bf16"
    combine_dtype: str = "f32"
    expert_dtype: str = "auto"
    deadline_s: float = 60.0
    wait_s: float = 60.0
    shard_cpus: float = 1.0
    shard_threads: int = 1
    shard_gpus: float = 1.0
    router_gpus: float = 1.0
    routers: int = 1
    router_threads: int = 1
    redundant: int = 0
    spare_slots: int | None = None
    auto_rebalance: bool = True
    rebalance_interval_s: float = 60.0
    trace: str | None = None
    trace_window_s: float = 10.0
    api_key: str | None = None
    check: bool = False
    verbose: bool = False
    vllm_flags: tuple[str, ...] = ()


def resolved(options: ServeOptions, num_experts: int, num_gpus: int) -> ServeOptions:
    """With what was left open: shards, and which transport is auto. num_gpus: of the cluster, 0 where vLLM computes on
    CPUs."""
    transport, shards = options.transport, options.shards
    if shards is None:
        shards = 1 if transport == "local" and num_gpus else default_shards(num_experts, num_gpus)
    if transport == "auto":
        transport = "ipc" if num_gpus and shards <= IPC_SHARDS else "socket"
    return replace(options, shards=shards, transport=transport)


def default_shards(num_experts: int, num_gpus: int) -> int:
    """A shard a GPU, as far as powers of two go, which split the experts evenly. On a CPU one a core, at most 2: on one
    machine more shards only add messages there."""
    if num_gpus:
        return min(num_experts, 1 << (num_gpus.bit_length() - 1))
    return max(1, min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def check(options: ServeOptions, target: Target, num_routers: int) -> Placement:
    """The first placement. options: `resolved`. Raises OptionError, PlacementError."""
    num_shards = options.shards
    assert num_shards is not None, "not resolved"
    if num_shards > target.spec.num_experts:
        raise PlacementError(
            f"--shards {num_shards}: {target.name} has {target.spec.num_experts} experts a layer, "
            f"expected 1 to {target.spec.num_experts} shards"
        )
    if options.nodes is not None and options.nodes > num_shards:
        raise OptionError(f"--nodes {options.nodes}: expected at most one for each of {num_shards} shards")
    if options.transport == "local" and num_routers > 1:
        raise OptionError(
            f"--transport local: {num_routers} routers would each hold all experts, expected socket or ipc"
        )
    if options.share_gpus is not None and options.transport != "ipc":
        raise OptionError(f"--share-gpus: of --transport ipc, not of {options.transport}")
    return first_placement(target.spec, num_shards, options)


def first_placement(spec: ModelSpec, num_shards: int, options: ServeOptions) -> Placement:
    """Before any load was seen: every expert counts the same. Raises PlacementError."""
    placement = even_split(spec.num_moe_layers, spec.num_experts, num_shards)
    if options.redundant:
        uniform = np.ones((spec.num_moe_layers, spec.num_experts))
        placement = plan(uniform, PlanRequest(num_shards, options.redundant)).placement
    if options.transport == "local":
        return placement
    spare = options.spare_slots if options.spare_slots is not None else -(-placement.slots_per_shard // 16)
    return with_spares(placement, spare)


def check_memory(spec: ModelSpec, placement: Placement, options: ServeOptions, available: int) -> None:
    """Raises OptionError where the slots cannot fit into available bytes, the memory of all nodes."""
    keeps_fp8 = spec.quant_block is not None and options.expert_dtype == "fp8"
    expert_bytes = spec.expert_bytes if keeps_fp8 else 2 * spec.expert_params
    needed = placement.slots.size * expert_bytes
    if needed > available:
        raise OptionError(
            f"--shards {placement.num_shards} --redundant {options.redundant}: {placement.slots.size} slots of "
            f"{expert_bytes / 1e6:.2f} MB need {needed / 1e9:.1f} GB, the cluster's memory is {available / 1e9:.1f} GB"
        )


def num_hosted(options: ServeOptions, num_shards: int, num_routers: int, num_gpus: int) -> int:
    """Shards that live in routers' processes. num_gpus: of the cluster, 0 where vLLM computes on CPUs."""
    most = min(num_shards, num_routers) if options.transport == "ipc" else 0
    if options.share_gpus is None:
        return max(min(most, num_shards + num_routers - num_gpus), 0) if num_gpus else 0
    return most if options.share_gpus else 0

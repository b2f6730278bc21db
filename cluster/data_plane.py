"""Build a router and the transport to its shards, inside a router actor."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
import torch

from ep.assign import Assigner
from ep.checkpoint import Checkpoint
from ep.cluster.membership import Membership
from ep.cluster.recording import Recording
from ep.cluster.router_actor import RouterSetup
from ep.compute.base import ExpertCompute
from ep.compute.choose import keeps_quantized, open_compute
from ep.graph_router import GraphRouter
from ep.link import NAMESPACE
from ep.placement import Placement
from ep.router import Router
from ep.shard import Shard
from ep.share import Share
from ep.transport.base import Endpoint, Transport, spec_fingerprint
from ep.transport.handshake import Greeting
from ep.transport.local import LocalTransport
from ep.transport.sockets import SocketTransport

MAX_DISPATCH_TOKENS = 2048
"""Larger batches go out in parts: the buffers of every link are sized for this many."""


@dataclass(frozen=True)
class DataPlane:
    """A router, what it sends over, and what records it."""

    router: Router | GraphRouter
    transport: Transport | None
    recording: Recording | None
    between_steps: threading.Lock = field(default_factory=threading.Lock)
    """Held during a step: whoever holds it may change what steps rely on."""

    def adopt(self, placement: Placement) -> None:
        """Route by this placement from the next step on. Raises PlacementError."""
        assigner = Assigner(placement)  # which takes long enough for a step to wait for
        with self.between_steps:
            self.router.set_placement(placement, assigner)

    def status(self) -> dict[str, Any]:
        """Counters of every link, and the losses that were mended."""
        links = [
            link.to_dict() | {"way": self.transport.describe(shard_idx) if self.transport else "in process"}
            for shard_idx, link in enumerate(self.router.stats())
        ]
        recorded = self.recording.status() if self.recording is not None else {}
        return {"links": links, "recoveries": [asdict(recovery) for recovery in self.router.recoveries]} | recorded

    def metrics(self) -> dict[str, Any]:
        """Counters of every link, slots of every shard, and the shards' load in the last window."""
        placement, recording = self.router.placement, self.recording
        return {
            "links": [link.to_dict() for link in self.router.stats()],
            "num_slots": [placement.slots_per_shard] * placement.num_shards,
            "last_window": recording.last_window(placement) if recording is not None else None,
        }


def open_data_plane(setup: RouterSetup, max_tokens: int, versions: Mapping[str, str], share: Share) -> DataPlane:
    """Waits for the shards and connects to them; max_tokens is the largest batch of vLLM's scheduler, of which this
    router dispatches its share.

    versions: for the trace's header. Raises CheckpointError, ClusterError, ShardLostError, TraceError.
    """
    checkpoint = Checkpoint(setup.checkpoint)
    spec = checkpoint.spec
    placement = Placement.from_dict(setup.placement)
    max_tokens = share.length(max_tokens)
    transport: Transport
    replace = None
    endpoints: list[Endpoint] = []
    if setup.transport == "local" and setup.on_gpu:
        return _open_on_gpu(setup, checkpoint, placement, max_tokens, versions, share)
    max_tokens = min(max_tokens, MAX_DISPATCH_TOKENS)
    if setup.transport == "local":
        indices = range(placement.num_shards)
        shards = [Shard.load(checkpoint, placement, shard_idx, fp8=setup.fp8) for shard_idx in indices]
        transport = LocalTransport(shards, spec.hidden_size, spec.top_k, max_tokens)
    else:
        coordinator = ray.get_actor(setup.link.coordinator_name(), namespace=NAMESPACE)
        membership = Membership(coordinator, setup.deadline_s, setup.start_timeout_s)
        greeting = Greeting(
            router_id=setup.link.router_name(setup.rank),
            fingerprint=spec_fingerprint(spec),
            hidden_size=spec.hidden_size,
            max_tokens=max_tokens,
            top_k=spec.top_k,
        )
        node_id = ray.get_runtime_context().get_node_id()
        endpoints = membership.endpoints()
        transport = SocketTransport(endpoints, greeting, setup.key, node_id)
        replace = membership.replace
    router = Router(
        spec,
        placement,
        transport,
        dispatch_dtype=setup.dispatch_dtype,
        deadline_s=setup.deadline_s,
        on_shard_lost=replace,
    )
    recording = Recording.start(setup, spec, placement, endpoints, versions)
    router.recorder = recording.recorder if recording is not None else None
    return DataPlane(router, transport, recording)


def _open_on_gpu(
    setup: RouterSetup,
    checkpoint: Checkpoint,
    placement: Placement,
    max_tokens: int,
    versions: Mapping[str, str],
    share: Share,
) -> DataPlane:
    """All slots in this process, on its GPU."""
    device = torch.device("cuda", share.rank)
    spec = checkpoint.spec

    def open_slots() -> ExpertCompute:
        compute = open_compute(spec, placement.slots_per_shard, device, max_tokens, for_router=True)
        quantized = keeps_quantized(spec, device, setup.fp8)
        for weights in checkpoint.iter_slots(placement.slots[:, 0], torch.bfloat16, quantized, None, device, 1):
            compute.add_slots(weights)
        compute.finish()
        return compute

    router = GraphRouter(spec, placement, open_slots, max_tokens, device)
    recording = Recording.start(setup, spec, placement, [], versions)
    router.recorder = recording.recorder if recording is not None else None
    return DataPlane(router, None, recording)

"""Build a router and the transport to its shards, inside a router actor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import ray
import torch

from ep.assign import Assigner
from ep.checkpoint import Checkpoint
from ep.cluster.membership import Membership
from ep.cluster.recording import Recording
from ep.cluster.router_actor import RouterSetup
from ep.compute.base import ExpertCompute
from ep.compute.choose import keeps_quantized, open_compute
from ep.far_shards import FarShards
from ep.graph_router import GraphRouter
from ep.ipc_router import IpcRouter
from ep.ipc_setup import MESSAGE_TOKENS, message_shape, open_device
from ep.link import NAMESPACE
from ep.model import ModelSpec
from ep.placement import Placement
from ep.router import Router
from ep.shard import Shard
from ep.share import Share
from ep.transport.base import spec_fingerprint
from ep.transport.handshake import Greeting
from ep.transport.ipc import IpcTransport
from ep.transport.local import LocalTransport
from ep.transport.mailbox import MailboxBlock
from ep.transport.sockets import SocketTransport

if TYPE_CHECKING:
    from ep.cluster.shard_actor import ShardActor
    from ep.errors import TransportError


@dataclass(frozen=True)
class DataPlane:
    """A router and what records it. describe: how a shard is reached, in words; close: ends what it sends over."""

    router: Router | GraphRouter | IpcRouter
    recording: Recording | None
    describe: Callable[[int], str]
    close: Callable[[], None]
    between_steps: threading.RLock = field(default_factory=threading.RLock)
    """Held during a step: whoever holds it may change what steps rely on."""

    def __post_init__(self) -> None:
        if self.recording is not None:
            self.recording.recorder.before_close = self.take_load

    def take_load(self) -> None:
        """Bring the counters up to date."""
        with self.between_steps:
            self.router.take_load()

    def adopt(self, placement: Placement) -> None:
        """Route by this placement from the next step on. Raises PlacementError."""
        assigner = Assigner(placement)  # which takes long enough for a step to wait for
        with self.between_steps:
            self.router.set_placement(placement, assigner)

    def status(self) -> dict[str, Any]:
        """Counters of every link, and the losses that were mended."""
        self.take_load()
        links = [link.to_dict() | {"way": self.describe(idx)} for idx, link in enumerate(self.router.stats())]
        recorded = self.recording.status() if self.recording is not None else {}
        return {"links": links, "recoveries": [asdict(recovery) for recovery in self.router.recoveries]} | recorded

    def metrics(self) -> dict[str, Any]:
        """Counters of every link, slots of every shard, and the shards' load in the last window."""
        self.take_load()
        placement, recording = self.router.placement, self.recording
        return {
            "links": [link.to_dict() for link in self.router.stats()],
            "num_slots": [placement.slots_per_shard] * placement.num_shards,
            "last_window": recording.last_window(placement) if recording is not None else None,
        }


def open_data_plane(
    setup: RouterSetup, max_tokens: int, versions: Mapping[str, str], share: Share, hosted: ShardActor | None
) -> DataPlane:
    """Waits for the shards and connects to them; with ipc that is left to the router's `open_slots`. max_tokens: the
    largest batch of vLLM's scheduler, of which this router dispatches its share.

    versions: for the trace's header. hosted: the shard that is to live in this process. Raises CheckpointError,
    ClusterError, OptionError, ShardLostError, TraceError.
    """
    checkpoint = Checkpoint(setup.checkpoint)
    spec = checkpoint.spec
    placement = Placement.from_dict(setup.placement)
    if setup.ipc is not None:
        return _open_ipc(setup, checkpoint, placement, versions, share, hosted)
    max_tokens = share.length(max_tokens)
    if setup.transport == "local" and setup.on_gpu:
        return _open_on_gpu(setup, checkpoint, placement, max_tokens, versions, share)
    max_tokens = min(max_tokens, MESSAGE_TOKENS)
    if setup.transport == "local":
        indices = range(placement.num_shards)
        shards = [Shard.load(checkpoint, placement, shard_idx, fp8=setup.fp8) for shard_idx in indices]
        transport = LocalTransport(shards, spec.hidden_size, spec.top_k, max_tokens)
        router = Router(spec, placement, transport, setup.dispatch_dtype, setup.combine_dtype, setup.deadline_s)
    else:
        membership = _membership(setup)
        router = _socket_router(setup, spec, placement, membership, max_tokens)
    recording = _record(setup, spec, placement, versions, router)
    return DataPlane(router, recording, router.describe, router.close)


def _record(
    setup: RouterSetup,
    spec: ModelSpec,
    placement: Placement,
    versions: Mapping[str, str],
    router: Router | GraphRouter | IpcRouter,
) -> Recording | None:
    """The recording of what the router counts, if there is to be one. Raises TraceError."""
    recording = Recording.start(setup, spec, placement, versions)
    router.recorder = recording.recorder if recording is not None else None
    return recording


def _socket_router(
    setup: RouterSetup, spec: ModelSpec, placement: Placement, membership: Membership, max_tokens: int
) -> Router:
    """Connected to all shards."""
    greeting = Greeting(
        router_id=setup.link.router_name(setup.rank),
        fingerprint=spec_fingerprint(spec),
        hidden_size=spec.hidden_size,
        max_tokens=max_tokens,
        top_k=spec.top_k,
    )
    node_id = ray.get_runtime_context().get_node_id()
    transport = SocketTransport(membership.endpoints(), greeting, setup.key, node_id)
    return Router(
        spec,
        placement,
        transport,
        dispatch_dtype=setup.dispatch_dtype,
        combine_dtype=setup.combine_dtype,
        deadline_s=setup.deadline_s,
        on_shard_lost=membership.replace,
    )


def _membership(setup: RouterSetup) -> Membership:
    """Waits for all shards."""
    coordinator = ray.get_actor(setup.link.coordinator_name(), namespace=NAMESPACE)
    return Membership(coordinator, setup.deadline_s, setup.start_timeout_s)


def _open_ipc(
    setup: RouterSetup,
    checkpoint: Checkpoint,
    placement: Placement,
    versions: Mapping[str, str],
    share: Share,
    hosted: ShardActor | None,
) -> DataPlane:
    """Shards of this node over ipc, one of them perhaps in this process; those of others over sockets.

    A shard in this process is sent its router's rows as any other is: its jobs join them with other routers' rows, and
    read the experts' weights once for all of them.
    """
    assert setup.ipc is not None
    spec = checkpoint.spec
    place = torch.device("cuda", share.rank) if setup.on_gpu else torch.device("cpu")
    device = open_device(place)
    block = MailboxBlock.open(setup.ipc.block, setup.ipc.num_routers, placement.num_shards)
    message = message_shape(spec, setup.ipc, place)
    transport = IpcTransport(device, block, setup.rank, message, placement, setup.deadline_s)
    members: list[Membership] = []
    far: list[FarShards] = []

    def open_slots() -> FarShards | None:
        if hosted is not None:
            hosted.load()
            coordinator = ray.get_actor(setup.link.coordinator_name(), namespace=NAMESPACE)
            ray.get(coordinator.hosted_up.remote(setup.rank, hosted.listen()))
            if setup.on_gpu:  # elsewhere a launch is the job itself, however long that takes
                transport.host(setup.rank, hosted.launching_s)
        membership = _membership(setup)
        members.append(membership)
        node_id = ray.get_runtime_context().get_node_id()
        elsewhere = [one.shard_idx for one in membership.endpoints() if one.node_id != node_id]
        for shard_idx in set(range(placement.num_shards)) - set(elsewhere):
            transport.replace(shard_idx, membership.attach(shard_idx, transport.handles))
        if elsewhere:
            transport.leave_out(elsewhere)
            sockets = _socket_router(setup, spec, router.placement, membership, message.max_tokens)
            far.append(FarShards(sockets, elsewhere, message.max_tokens, place))
        return far[0] if far else None

    def replace(shard_idx: int, error: TransportError) -> None:
        members[0].replace(shard_idx, error)
        transport.replace(shard_idx, members[0].attach(shard_idx, transport.handles))

    def describe(shard_idx: int) -> str:
        if far and shard_idx in far[0].shards:
            return far[0].router.describe(shard_idx)
        return "in process" if hosted is not None and shard_idx == setup.rank else "ipc"

    def close() -> None:
        router.close()
        block.close()

    router = IpcRouter(spec, placement, transport, device, open_slots, replace, share)
    recording = _record(setup, spec, placement, versions, router)
    return DataPlane(router, recording, describe, close)


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
    recording = _record(setup, spec, placement, versions, router)
    return DataPlane(router, recording, lambda _: "in process", router.close)

"""Routers and shards small enough for Triton's interpreter, and for the twins: their buffers lie in this process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import torch

from ep.kernels import p2p_layout as layout
from ep.kernels.p2p import Desk, Job, Plan, Tables
from ep.kernels.p2p_layout import Header, MessageShape
from ep.kernels.p2p_reference import _next

HIDDEN = 256


@dataclass(frozen=True)
class World:
    """One router and its S shards, each of which has one job's buffers. `copy` gives another with the same contents."""

    message: MessageShape
    tables: Tables
    plan: Plan
    load: torch.Tensor
    words: torch.Tensor
    host: torch.Tensor
    inbox: torch.Tensor
    mailboxes: torch.Tensor
    box: torch.Tensor
    jobs: list[Job]
    desks: list[Desk]
    shard_hosts: torch.Tensor

    @property
    def num_shards(self) -> int:
        return len(self.inbox)

    @property
    def flags(self) -> torch.Tensor:
        size = (self.num_shards, self.message.max_tokens)
        return self.box[: 4 * size[0] * size[1]].view(torch.int32).view(size)

    @property
    def partials(self) -> torch.Tensor:
        values = self.box[self.message.partials_offset(self.num_shards) :].view(self.num_shards, -1)
        size = self.message.max_tokens * self.message.hidden
        shape = (self.num_shards, self.message.max_tokens, self.message.hidden)
        return values.view(self.message.partial_dtype)[:, :size].view(shape)

    def addresses(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of its rows, on the device."""
        return torch.tensor([row.data_ptr() for row in tensor], device=self.words.device)


def make_tables(num_layers: int, num_experts: int, num_shards: int, num_slots: int, seed: int) -> Tables:
    """A random placement: every expert once, then replicas on other shards while slots are free."""
    generator = torch.Generator().manual_seed(seed)
    replicas = torch.full((num_layers, num_experts, num_shards), -1, dtype=torch.int32)
    num_replicas = torch.zeros(num_layers, num_experts, dtype=torch.int32)
    for layer in range(num_layers):
        free = torch.randperm(num_shards * num_slots, generator=generator).tolist()
        owners: dict[int, set[int]] = {}
        for turn, slot in enumerate(free):
            expert, shard = turn % num_experts, slot // num_slots
            if shard in owners.setdefault(expert, set()):
                continue
            owners[expert].add(shard)
            replicas[layer, expert, num_replicas[layer, expert]] = slot
            num_replicas[layer, expert] += 1
    return Tables(replicas, num_replicas, num_slots)


def make_world(
    num_shards: int = 3, max_tokens: int = 8, top_k: int = 3, dtype: torch.dtype = torch.float8_e4m3fn,
    partial_dtype: torch.dtype = torch.bfloat16, seed: int = 0, first_seq: int = 0,
    far_shards: tuple[int, ...] = (), num_experts: int = 8,
) -> World:  # fmt: skip
    message = MessageShape(max_tokens, HIDDEN, top_k, dtype, partial_dtype)
    words = torch.zeros(layout.NUM_WORDS, dtype=torch.int32)
    words[layout.NUM_TOKENS], words[layout.SEQ] = 1 << 30, first_seq
    world = World(
        message,
        make_tables(2, num_experts, num_shards, -(-num_experts // num_shards) + 2, seed),
        Plan.allocate(max_tokens, top_k, num_shards, torch.device("cpu"), far_shards),
        torch.zeros(2, 2, num_experts, dtype=torch.int64),
        words,
        torch.zeros(layout.router_words(num_shards), dtype=torch.int32),
        torch.zeros(num_shards, message.inbox_bytes, dtype=torch.uint8),
        torch.zeros(num_shards, 1, dtype=torch.int64),
        torch.zeros(message.return_bytes(num_shards), dtype=torch.uint8),
        [Job.allocate(message, max_tokens, torch.device("cpu")) for _ in range(num_shards)],
        [Desk.allocate(1, torch.device("cpu"), 0) for _ in range(num_shards)],
        torch.zeros(num_shards, layout.shard_words(1), dtype=torch.int32),
    )
    for desk in world.desks:
        desk.served[0] = GENERATION
        desk.taken[:, 0] = first_seq
    world.words[layout.GENERATION] = GENERATION
    return _at_home(world)


GENERATION = 3
IN_HOST_MEMORY = ("host", "mailboxes", "shard_hosts")


def _at_home(world: World) -> World:
    """The desks' addresses are those of this world."""
    desks = []
    for shard, desk in enumerate(world.desks):
        desk.inboxes[0] = world.inbox[shard].data_ptr()
        desks.append(replace(desk, host_address=world.shard_hosts[shard].data_ptr()))
    return replace(world, desks=desks)


def copy(world: World, device: str = "cpu") -> World:
    """The same in memory of its own, on a GPU if so asked."""

    def clone(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.clone().to(device)

    def clones(record: object) -> dict[str, torch.Tensor | None]:
        return {name: clone(value) for name, value in vars(record).items() if isinstance(value, torch.Tensor)}

    tensors = clones(world)
    for name in IN_HOST_MEMORY if device != "cpu" else ():
        tensors[name] = getattr(world, name).clone().pin_memory()
    copied = replace(
        world,
        tables=replace(world.tables, **clones(world.tables)),
        plan=replace(world.plan, **clones(world.plan)),
        jobs=[replace(job, **clones(job)) for job in world.jobs],
        desks=[replace(desk, **clones(desk)) for desk in world.desks],
        **tensors,
    )
    return _at_home(copied)


def next_seq(world: World) -> int:
    """The number of the messages that are under way."""
    return _next(world.words.cpu())


def run_router(
    ops: ModuleType,
    world: World,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    first: int = 0,
    addresses: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """addresses: of the inboxes and the mailboxes, on the device; finding them waits for the stream."""
    inboxes, mailboxes = addresses or (world.addresses(world.inbox), world.addresses(world.mailboxes))
    ops.dispatch_tokens(
        x, ids, weights, world.tables, world.plan, world.message, world.load, inboxes, mailboxes, world.words, 1, first
    )


def run_shards(ops: ModuleType, world: World, seq: int, parts: int = 1, patience: int = 1) -> None:
    """Every shard that has a message answers it, in so many jobs, the last of which may find nothing more: each row's
    partial is what its values stand for, times its weights."""
    message = world.message
    for shard in range(world.num_shards):
        header = Header.unpack(int(world.mailboxes[shard]))
        if header.seq != seq:
            continue
        job, desk = world.jobs[shard], world.desks[shard]
        capacity = -(-header.num_tokens // parts)
        for _ in range(parts):
            ops.take(desk, message, 2, job, capacity, capacity, layout.LIKELY_UNIT, patience, 0, 1)
            ops.collect(desk, message, job, capacity)
            values = job.rows.float()
            if job.scales is not None:
                values = values * job.scales.repeat_interleave(128, 1)
            here = torch.where(job.slot_ids >= 0, job.weights, 0)
            total = sum(here[:, k : k + 1] for k in range(message.top_k))  # in order: the same bits everywhere
            boxes = world.addresses(world.partials[shard : shard + 1])
            flags = world.addresses(world.flags[shard : shard + 1])
            partials = (values * total).to(message.partial_dtype)
            ops.return_partials(partials, job, boxes, flags, desk, capacity)

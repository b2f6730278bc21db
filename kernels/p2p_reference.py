"""The torch twins of kernels/p2p.py for memory of this process: the same arguments, the same bits. Written to be read.

Addresses are followed as the kernels follow them. `wait_partials` and `take` look once and say whether their wait is
over.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ep.kernels import p2p_layout as layout
from ep.kernels.p2p import FIRST_LAYER, JOIN_ROWS, WINDOW, Desk, Job, Plan, Tables
from ep.kernels.p2p_layout import Header, MessageShape, pack_header
from ep.kernels.reference import TOKEN_BLOCK, quantize_tokens


def at_address(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Host memory as a tensor, not owned by it."""
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    if not size:
        return torch.empty(shape, dtype=dtype)
    buffer = (ctypes.c_uint8 * size).from_address(address)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).view(shape)


@dataclass(frozen=True)
class Inbox:
    """Views of one router's message to one shard."""

    rows: torch.Tensor
    scales: torch.Tensor | None
    slot_ids: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def at(cls, address: int, message: MessageShape) -> Inbox:
        tokens, blocks = message.max_tokens, message.hidden // TOKEN_BLOCK
        scales = None
        if message.quantized:
            scales = at_address(address + message.scales_offset, (tokens, blocks), torch.float32)
        pairs = (tokens, message.top_k)
        return cls(
            at_address(address, (tokens, message.hidden), message.dtype),
            scales,
            at_address(address + message.slot_ids_offset, pairs, torch.int32),
            at_address(address + message.weights_offset, pairs, torch.float32),
        )


def plan_dispatch(
    topk_ids: torch.Tensor, tables: Tables, plan: Plan, load: torch.Tensor, words: torch.Tensor, layer_pos: int,
    first_token: int = 0,
) -> None:  # fmt: skip
    num_rows, num_shards = len(topk_ids), len(plan.counts)
    num_layers, num_experts, _ = tables.replicas.shape
    num_tokens = min(max(int(words[layout.NUM_TOKENS]) - first_token, 0), num_rows)
    num_decode = int(words[layout.NUM_DECODE]) - first_token
    plan.slots[:num_rows] = plan.local_slots[:num_rows] = plan.position[:, :num_rows] = -1
    plan.counts.zero_()
    words[layout.SEQ] += 1
    ids = topk_ids[:num_tokens].long()
    token, choice = ((ids >= 0) & (ids < num_experts)).nonzero(as_tuple=True)
    expert, window = ids[token, choice], token // WINDOW
    rank = window + _rank_among_equals(window * num_experts + expert)
    slot = tables.replicas[layer_pos, expert, rank % tables.num_replicas[layer_pos, expert]]
    plan.slots[token, choice] = slot
    shard = slot // tables.slots_per_shard
    is_local = shard == plan.local_shard
    plan.local_slots[token[is_local], choice[is_local]] = slot[is_local] - plan.local_shard * tables.slots_per_shard
    for one in range(num_shards):
        if not plan.is_sent[one]:
            continue
        goes = torch.zeros(num_tokens, dtype=torch.bool)
        goes[token[shard == one]] = True
        there = goes.nonzero().flatten()
        plan.position[one, there] = torch.arange(len(there), dtype=torch.int32)
        plan.counts[one] = len(there)
    plan.sent.add_(torch.stack([plan.counts, (plan.counts > 0).int()], 1))
    pair = ((token < num_decode).long() * num_layers + layer_pos) * num_experts + expert
    load += pair.bincount(minlength=load.numel()).view(load.shape)


def _rank_among_equals(keys: torch.Tensor) -> torch.Tensor:
    """How many of the earlier ones are the same."""
    order = keys.argsort(stable=True)
    counts = keys[order].unique_consecutive(return_counts=True)[1]
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.empty_like(keys).scatter_(0, order, torch.arange(len(keys)) - starts)


def put_tokens(
    x: torch.Tensor, weights: torch.Tensor, plan: Plan, message: MessageShape, inboxes: torch.Tensor,
    mailboxes: torch.Tensor, words: torch.Tensor, layer_pos: int, slots_per_shard: int,
) -> None:  # fmt: skip
    if words[layout.FAILED]:
        return
    num_rows = len(weights)
    quantized = quantize_tokens(x, message.dtype) if message.quantized else None
    for shard, count in enumerate(plan.counts.tolist()):
        if not count:
            continue
        inbox = Inbox.at(int(inboxes[shard]), message)
        token = (plan.position[shard, :num_rows] >= 0).nonzero().flatten()
        slots = plan.slots[token]
        inbox.rows[:count] = x[token] if quantized is None else quantized.q[token]
        if quantized is not None and inbox.scales is not None:
            inbox.scales[:count] = quantized.scale_inv[token]
        is_here = (slots >= shard * slots_per_shard) & (slots < (shard + 1) * slots_per_shard)
        inbox.slot_ids[:count] = torch.where(is_here, slots - shard * slots_per_shard, -1)
        inbox.weights[:count] = weights[token]
        header = pack_header(int(words[layout.SEQ]), layer_pos, count, int(words[layout.GENERATION]))
        for address in (int(inboxes[shard]) + message.header_offset, int(mailboxes[shard])):
            at_address(address, (1,), torch.int64)[0] = header


def wait_partials(plan: Plan, flags: torch.Tensor, words: torch.Tensor, host_address: int) -> bool:
    if words[layout.FAILED]:
        return True
    num_shards = plan.position.shape[0]
    host = at_address(host_address, (layout.router_words(num_shards),), torch.int32)
    is_late = (plan.counts > 0) & (flags[:, 0] - words[layout.SEQ] < 0)
    if not is_late.any():
        if host[layout.WAITING_SEQ] == words[layout.SEQ]:
            host[layout.DONE_SEQ] = words[layout.SEQ]
        return True
    host[layout.WAITING_SEQ] = words[layout.SEQ]
    if not host[layout.ABORT]:
        return False
    host[layout.LATE : layout.LATE + num_shards] = is_late.int()
    words[layout.FAILED] = 1
    host[layout.FAILED_STEP] = words[layout.STEP]
    host[layout.DONE_SEQ] = words[layout.SEQ]
    return True


def combine_partials(
    partials: torch.Tensor, plan: Plan, out: torch.Tensor, local_partial: torch.Tensor | None = None
) -> None:
    total = torch.zeros(out.shape, dtype=torch.float32)
    for shard in range(len(partials)):
        position = plan.position[shard, : len(out)]
        token = (position >= 0).nonzero().flatten()
        total[token] += partials[shard, position[token].long()].float()
        if local_partial is not None and shard == plan.local_shard:
            total += local_partial
    out.copy_(total)


def take(
    desk: Desk, message: MessageShape, num_layers: int, job: Job, capacity: int, patience: int, window: int
) -> bool:
    headers = list(_headers(desk, message))
    waiting = [one for one in headers if _is_waiting(desk, message, num_layers, *one)]
    host = at_address(desk.host_address, (layout.shard_words(len(desk.inboxes)),), torch.int32)
    words = desk.words
    waiting.sort(key=lambda one: (one[0] - int(words[layout.NEXT])) % len(desk.inboxes))
    lead = waiting[:1]
    missing = _on_their_way(desk, lead[0][1], headers, waiting) if lead else []
    if not lead:
        is_over = bool(words[layout.IDLE]) or words[layout.POLLED] + 1 >= patience
    else:
        is_over = not missing or words[layout.WAITED] >= window * (1 if lead[0][1].layer_pos else FIRST_LAYER)
    if not is_over and not host[layout.STOP]:
        words[layout.WAITED if lead else layout.POLLED] += 1
        return False
    words[layout.POLLED] = words[layout.WAITED] = 0
    job.job.zero_()
    table = job.job[layout.JOB_ROUTERS : layout.JOB_ROUTERS + 5 * layout.MAX_JOINED].view(5, layout.MAX_JOINED)
    table[0] = -1
    total, parts, answered = 0, 0, 0
    for router in missing:
        desk.taken[router, 3] = -1
    for router, header in lead + sorted(waiting[1:], key=lambda one: one[0]):
        part_seq, part_rows = desk.taken[router, 1:3].tolist()
        first = part_rows if part_seq == header.seq else 0
        rows = min(header.num_tokens - first, capacity - total)
        if header.layer_pos != lead[0][1].layer_pos or not rows or parts == layout.MAX_JOINED:
            continue
        is_last = first + rows == header.num_tokens
        table[:, parts] = torch.tensor([router, first, rows, header.seq, is_last])
        desk.taken[router, 1:3] = torch.tensor([header.seq, first + rows])
        if is_last:
            desk.taken[router, 0] = header.seq
            desk.taken[router, 3] = (header.layer_pos + 1) % num_layers if header.num_tokens <= JOIN_ROWS else -1
        total, parts, answered = total + rows, parts + 1, answered + is_last
    if lead:
        words[layout.NEXT] = (lead[0][0] + 1) % len(desk.inboxes)
        job.job[layout.JOB_LAYER] = lead[0][1].layer_pos
    job.job[layout.JOB_TOKENS] = total
    job.layer_idx[0], job.num_tokens[0] = job.job[layout.JOB_LAYER], total
    words[layout.IDLE] = int(not lead)
    counted = words[layout.COUNTED : layout.COUNTED + layout.NUM_COUNTS]
    counted += torch.tensor([len(lead), answered, parts if parts > 1 else 0, total], dtype=torch.int32)
    return True


def _on_their_way(
    desk: Desk, lead: Header, headers: list[tuple[int, Header]], waiting: list[tuple[int, Header]]
) -> list[int]:
    """Routers that are likely to ask for the same layer next, where that is worth waiting for."""
    if lead.num_tokens > JOIN_ROWS:
        return []
    here = {router for router, _ in headers} - {router for router, _ in waiting}
    return [router for router in sorted(here) if desk.taken[router, 3] == lead.layer_pos]


def _headers(desk: Desk, message: MessageShape) -> Iterator[tuple[int, Header]]:
    """Of the routers that are there."""
    for router, inbox in enumerate(desk.inboxes.tolist()):
        if inbox:
            yield router, Header.unpack(int(at_address(inbox + message.header_offset, (1,), torch.int64)))


def _is_waiting(desk: Desk, message: MessageShape, num_layers: int, router: int, header: Header) -> bool:
    is_new = header.num_tokens > 0 and header.seq != int(desk.taken[router, 0])
    is_known = header.generation in desk.served.tolist()
    return is_new and is_known and header.num_tokens <= message.max_tokens and header.layer_pos < num_layers


def collect(desk: Desk, message: MessageShape, job: Job, capacity: int) -> None:
    start = 0
    for router, first, count, _, _ in _entries(job):
        inbox = Inbox.at(int(desk.inboxes[router]), message)
        ours, theirs = slice(start, start + count), slice(first, first + count)
        job.rows[ours] = inbox.rows[theirs]
        if job.scales is not None and inbox.scales is not None:
            job.scales[ours] = inbox.scales[theirs]
        job.slot_ids[ours] = inbox.slot_ids[theirs]
        job.weights[ours] = inbox.weights[theirs]
        start += count
    assert start <= capacity


def return_partials(
    partials: torch.Tensor, job: Job, boxes: torch.Tensor, flags: torch.Tensor, desk: Desk, capacity: int
) -> None:
    start, hidden = 0, partials.shape[1]
    host = at_address(desk.host_address, (layout.shard_words(len(desk.inboxes)),), torch.int32)
    entries = list(_entries(job))
    for router, first, count, _, _ in entries:
        box = at_address(int(boxes[router]), (first + count, hidden), partials.dtype)
        box[first:] = partials[start : start + count]
        start += count
    for router, _, _, seq, is_last in entries:
        if is_last:
            at_address(int(flags[router]), (1,), torch.int32)[0] = seq
            host[layout.ANSWERED + router] = seq
    done, counted = layout.DONE + 1, desk.words[layout.COUNTED : layout.COUNTED + layout.NUM_COUNTS]
    host[done : done + layout.NUM_COUNTS] = counted
    desk.words[layout.JOB] += 1
    host[layout.DONE] = desk.words[layout.JOB]


def _entries(job: Job) -> Iterator[tuple[int, ...]]:
    """router, first row, rows, seq, is last: of each message that the job joins."""
    joined = layout.MAX_JOINED
    table = job.job[layout.JOB_ROUTERS : layout.JOB_ROUTERS + 5 * joined].view(5, joined).T
    return (tuple(entry) for entry in table.tolist() if entry[0] >= 0)

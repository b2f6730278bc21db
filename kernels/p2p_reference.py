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
from ep.kernels.p2p import CREDIT, FLAG_LOOKS, JOIN_ROWS, LOOK, RETRY, WINDOW, WORTH, Desk, Job, Plan, Tables
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
    flags: torch.Tensor

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
            at_address(address + message.flags_offset, (tokens,), torch.int32),
        )


def begin_step(
    words: torch.Tensor, host_address: int, num_tokens: int, num_decode: int, step: int, begun: int
) -> None:
    words[layout.NUM_TOKENS], words[layout.NUM_DECODE], words[layout.STEP] = num_tokens, num_decode, step
    if begun:
        at_address(host_address, (layout.LATE,), torch.int32)[layout.BEGUN] = begun


def dispatch_tokens(
    x: torch.Tensor, topk_ids: torch.Tensor, weights: torch.Tensor, tables: Tables, plan: Plan, message: MessageShape,
    load: torch.Tensor, inboxes: torch.Tensor, mailboxes: torch.Tensor, words: torch.Tensor, layer_pos: int,
    first_token: int = 0,
) -> None:  # fmt: skip
    num_rows = len(topk_ids)
    num_layers, num_experts, _ = tables.replicas.shape
    num_tokens = _num_tokens(words, num_rows, first_token)
    num_decode = int(words[layout.NUM_DECODE]) - first_token
    plan.slots[:num_rows] = -1
    plan.owners[:num_rows] = 0
    ids = topk_ids[:num_tokens].long()
    token, choice = ((ids >= 0) & (ids < num_experts)).nonzero(as_tuple=True)
    expert, window = ids[token, choice], token // WINDOW
    rank = window + _rank_among_equals(window * num_experts + expert)
    slot = tables.replicas[layer_pos, expert, rank % tables.num_replicas[layer_pos, expert]]
    plan.slots[token, choice] = slot
    shard = slot // tables.slots_per_shard
    pair = ((token < num_decode).long() * num_layers + layer_pos) * num_experts + expert
    load += pair.bincount(minlength=load.numel()).view(load.shape)
    words[layout.SENT] = seq = _next(words)
    generation = int(words[layout.GENERATION])
    quantized = quantize_tokens(x, message.dtype) if message.quantized else None
    for one in range(plan.num_shards):
        if not plan.is_sent[one]:
            continue
        goes = torch.zeros(num_tokens, dtype=torch.bool)
        goes[token[shard == one]] = True
        plan.owners[:num_tokens] |= goes.long() << one
        if words[layout.FAILED] or not num_tokens:
            continue
        inbox = Inbox.at(int(inboxes[one]), message)
        for address in (int(inboxes[one]) + message.header_offset, int(mailboxes[one])):
            at_address(address, (1,), torch.int64)[0] = pack_header(seq, layer_pos, num_tokens, generation)
        there = goes.nonzero().flatten()
        inbox.rows[there] = x[there] if quantized is None else quantized.q[there]
        if quantized is not None and inbox.scales is not None:
            inbox.scales[there] = quantized.scale_inv[there]
        here = plan.slots[there]
        inbox.slot_ids[there] = torch.where(
            here // tables.slots_per_shard == one, here - one * tables.slots_per_shard, -1
        )
        inbox.weights[there] = weights[there]
        inbox.flags[:num_tokens] = _wrapped(2 * seq) + goes.int()


def _num_tokens(words: torch.Tensor, num_rows: int, first_token: int) -> int:
    """Of a call, padding left out."""
    return min(max(int(words[layout.NUM_TOKENS]) - first_token, 0), num_rows)


def _next(words: torch.Tensor) -> int:
    """The number of the call's messages, none whose flags look like memory that was never written."""
    seq = int(words[layout.SEQ]) + 1
    return _wrapped(seq + (seq & 0x7FFFFFFF == 0))


def _wrapped(value: int) -> int:
    """As int32."""
    return (value + 2**31) % 2**32 - 2**31


def _rank_among_equals(keys: torch.Tensor) -> torch.Tensor:
    """How many of the earlier ones are the same."""
    order = keys.argsort(stable=True)
    counts = keys[order].unique_consecutive(return_counts=True)[1]
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.empty_like(keys).scatter_(0, order, torch.arange(len(keys)) - starts)


def wait_partials(
    plan: Plan, flags: torch.Tensor, words: torch.Tensor, host_address: int, num_rows: int, first_token: int = 0
) -> bool:
    host = at_address(host_address, (layout.router_words(plan.num_shards),), torch.int32)
    num_tokens, seq = _num_tokens(words, num_rows, first_token), int(words[layout.SENT])
    shards = torch.arange(plan.num_shards)
    is_awaited = (plan.owners[:num_tokens] >> shards[:, None]) & 1 != 0
    is_late = is_awaited & (flags[:, :num_tokens] != seq)
    if not words[layout.FAILED]:
        if is_late.any():
            host[layout.WAITING_SEQ] = seq
            if not host[layout.ABORT]:
                return False
            host[layout.LATE : layout.LATE + plan.num_shards] = is_late.any(1).int()
            words[layout.FAILED] = 1
            host[layout.FAILED_STEP] = words[layout.STEP]
        if host[layout.WAITING_SEQ] == seq:
            host[layout.DONE_SEQ] = seq
    words[layout.SEQ] = seq
    rows = is_awaited.sum(1)
    plan.sent.add_(torch.stack([rows, (rows > 0).long()], 1))
    return True


def combine_partials(partials: torch.Tensor, plan: Plan, out: torch.Tensor) -> None:
    total = torch.zeros(out.shape, dtype=torch.float32)
    for shard in range(plan.num_shards):
        token = (plan.owners[: len(out)] >> shard & 1).nonzero().flatten()
        total[token] += partials[shard, token].float()
    out.copy_(total)


def wait_and_combine(
    partials: torch.Tensor, plan: Plan, out: torch.Tensor, flags: torch.Tensor, words: torch.Tensor, host_address: int,
    first_token: int = 0,
) -> bool:  # fmt: skip
    is_over = wait_partials(plan, flags, words, host_address, len(out), first_token)
    if is_over:
        combine_partials(partials, plan, out)
    return is_over


def take(
    desk: Desk, message: MessageShape, num_layers: int, job: Job, capacity: int, largest: int, likely: int,
    patience: int, window: int, whole_rows: int,
) -> bool:  # fmt: skip
    headers = dict(_headers(desk, message))
    asked = {
        router: header for router, header in headers.items() if _is_waiting(desk, message, num_layers, router, header)
    }
    waiting = [
        (router, header)
        for router, header in asked.items()
        if capacity >= largest or layout.likely_rows(header.num_tokens, likely) <= 2 * capacity
    ]
    host = at_address(desk.host_address, (layout.shard_words(len(desk.inboxes)),), torch.int32)
    words = desk.words
    waiting.sort(key=lambda one: (one[0] - int(words[layout.NEXT])) % len(desk.inboxes))
    behind = {router: _behind(desk, header, num_layers, headers, asked) for router, header in waiting}
    lead = ([one for one in waiting if not behind[one[0]]] or waiting)[:1]
    missing = [router for router in behind[lead[0][0]] if router not in asked] if lead else []
    debt, credit = int(words[layout.DEBT]), CREDIT * window * (num_layers + 2)
    if not lead:
        is_over = bool(asked or words[layout.IDLE]) or words[layout.POLLED] + 1 >= patience
    else:
        messages = [lead[0][1], *(headers[router] for router in missing)]
        is_over = not missing or words[layout.WAITED] >= _most(credit, debt, messages, whole_rows)
    if not is_over:
        words[layout.WAITED if lead else layout.POLLED] += 1
        if not host[layout.STOP] or (words[layout.WAITED] + words[layout.POLLED]) % LOOK:
            return False
    waited = int(words[layout.WAITED])
    asking = [(router, header) for router, header in waiting if header.layer_pos == lead[0][1].layer_pos]
    asking.sort(key=lambda one: (one[0] - lead[0][0]) % len(desk.inboxes))
    inboxes = {router: Inbox.at(int(desk.inboxes[router]), message) for router, _ in asking}
    flags = {router: inboxes[router].flags[: header.num_tokens].clone() for router, header in asking}
    is_late = {router: bool((flags[router] | 1 != _wrapped(2 * header.seq) | 1).any()) for router, header in asking}
    newest = dict(_headers(desk, message))
    gone_on = [router for router, header in asking if is_late[router] and newest[router].seq != header.seq]
    if any(is_late.values()) and not gone_on and words[layout.LOOKED] + 1 < FLAG_LOOKS:
        words[layout.LOOKED] += 1
        return False
    words[layout.POLLED] = words[layout.WAITED] = words[layout.LOOKED] = 0
    asking = [(router, header) for router, header in asking if not is_late[router]]
    ended = job.job[layout.ENDED : layout.ENDED + len(desk.inboxes)].zero_()
    for router, header in waiting:
        job.job[layout.NUMBERS + router] = header.seq
    met = bool(asking or gone_on)
    # Who has gone on has another message, which the next job finds, as it does what is too large for this one.
    found = met or bool(asked and not waiting)
    for router in missing if met else []:
        desk.taken[router, 3] = -1
    total, parts, answered = 0, 0, 0
    saved: list[int] = []
    for router, header in asking:
        if total == capacity:
            break
        _, part_seq, part_rows = desk.taken[router, :3].tolist()
        skip = part_rows if part_seq == header.seq else 0
        there = (flags[router] & 1).nonzero().flatten().int()
        mine = there[skip : skip + capacity - total]
        job.source[total : total + len(mine)] = router << layout.ROW_BITS | mine
        job.numbers[total : total + len(mine)] = header.seq
        desk.taken[router, 1:3] = torch.tensor([header.seq, skip + len(mine)])
        if skip + len(mine) == len(there):
            ended[router] = 1
            answered += bool(len(there))
            desk.taken[router, 0] = header.seq
            desk.taken[router, 3] = (header.layer_pos + 1) % num_layers if header.num_tokens <= JOIN_ROWS else -1
        total, parts = total + len(mine), parts + bool(len(mine))
        saved.append(window * min(2 * len(mine), whole_rows) // whole_rows)
    if lead:  # also past one whose rows did not come
        words[layout.NEXT] = (lead[0][0] + 1) % len(desk.inboxes)
    job.job[layout.JOB_LAYER] = lead[0][1].layer_pos if lead else 0
    job.layer_idx[0], job.num_tokens[0] = job.job[layout.JOB_LAYER], total
    most = max(saved, default=0)
    earned = sum(saved) - most + -(-most // RETRY)
    words[layout.DEBT] = max(debt + waited - earned, 0)
    words[layout.IDLE] = int(not found)
    counted = words[layout.COUNTED : layout.COUNTED + layout.NUM_COUNTS]
    counted += torch.tensor([found, answered, parts if parts > 1 else 0, total], dtype=torch.int32)
    return True


def _most(credit: int, debt: int, messages: list[Header], whole_rows: int) -> int:
    """Looks in which the first of these may be held for the others, whose newest ones they are."""
    half = credit // 2 if 2 * debt <= credit else 0
    common = min(messages[0].num_tokens, max((one.num_tokens for one in messages[1:]), default=0))
    return half * min(WORTH * common, whole_rows) // whole_rows


def _behind(
    desk: Desk, header: Header, num_layers: int, headers: dict[int, Header], asked: dict[int, Header]
) -> list[int]:
    """Routers for which a message is held, those that have asked for an earlier layer included."""
    if header.num_tokens > JOIN_ROWS:
        return []
    found = []
    for router in headers:
        theirs = asked.get(router)
        if theirs is None:
            position = int(desk.taken[router, 3])
        else:
            position = theirs.layer_pos if theirs.num_tokens <= JOIN_ROWS else -1
        lag = (header.layer_pos - position) % num_layers
        if position >= 0 and 2 * lag < num_layers and (lag or theirs is None):
            found.append(router)
    return found


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
    for router, ours, theirs in _rows(job):
        inbox = Inbox.at(int(desk.inboxes[router]), message)
        job.rows[ours] = inbox.rows[theirs]
        if job.scales is not None and inbox.scales is not None:
            job.scales[ours] = inbox.scales[theirs]
        job.slot_ids[ours], job.weights[ours] = inbox.slot_ids[theirs], inbox.weights[theirs]
    assert int(job.num_tokens) <= capacity


def return_partials(
    partials: torch.Tensor, job: Job, boxes: torch.Tensor, flags: torch.Tensor, desk: Desk, capacity: int
) -> None:
    num_routers, hidden = len(desk.inboxes), partials.shape[1]
    host = at_address(desk.host_address, (layout.shard_words(num_routers),), torch.int32)
    for router, ours, theirs in _rows(job):
        length = int(theirs.max()) + 1
        at_address(int(boxes[router]), (length, hidden), partials.dtype)[theirs] = partials[ours]
        at_address(int(flags[router]), (length,), torch.int32)[theirs] = job.numbers[ours]
    for router in job.job[layout.ENDED : layout.ENDED + num_routers].nonzero().flatten().tolist():
        host[layout.ANSWERED + router] = job.job[layout.NUMBERS + router]
    done, counted = layout.DONE + 1, desk.words[layout.COUNTED : layout.COUNTED + layout.NUM_COUNTS]
    host[done : done + layout.NUM_COUNTS] = counted
    desk.words[layout.JOB] += 1
    host[layout.DONE] = desk.words[layout.JOB]


def _rows(job: Job) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Of each router that the job has rows of: which ones they are in the job, and in its message."""
    source = job.source[: int(job.num_tokens)].long()
    routers = source >> layout.ROW_BITS
    for router in routers.unique().tolist():
        ours = (routers == router).nonzero().flatten()
        yield router, ours, source[ours] & (1 << layout.ROW_BITS) - 1

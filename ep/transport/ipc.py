"""The router's side of the data plane between GPUs of one node: it only launches kernels (kernels/p2p.py).

    begin_step ─> (dispatch ─> combine, once per MoE layer) ─> check
                              │
                              └ may all be replayed from one captured graph

Buffers are made once, for max_tokens; shards come and go by `replace`, placements by `set_placement`, both between
steps and in place, so that captured graphs stay valid. A wait on the device ends by the shard's flag or by the abort
word, which a watchdog thread sets when a shard is lost or late or refuses; `check` turns that into an error after the
step.

Shape legend: T tokens of a call (padding included), H hidden, K top-k, S shards, L MoE layers, E logical experts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection

import numpy as np
import torch

from ep.errors import DeadlineError, OptionError, PlacementError, ShardFailedError, ShardLostError, TransportError
from ep.kernels import p2p
from ep.kernels import p2p_layout as layout
from ep.kernels.p2p_layout import MessageShape
from ep.kernels.shared_memory import Mapped
from ep.placement import Placement
from ep.transport import mailbox
from ep.transport.ipc_device import IpcDevice
from ep.transport.ipc_handles import Carried, RouterHandles, ShardHandles
from ep.transport.ipc_watch import STUCK_S, IsLost, WaitWatch
from ep.transport.mailbox import MailboxBlock


class IpcTransport:
    """For one thread. router_idx: this router's place in the block, its own as long as it lives.

    deadline_s: how long a shard may take for one layer. is_lost: what else is known about shards than whether
    their processes run. Raises OptionError for what the kernels do not support.
    """

    def __init__(
        self,
        device: IpcDevice,
        block: MailboxBlock,
        router_idx: int,
        message: MessageShape,
        placement: Placement,
        deadline_s: float = 30.0,
        is_lost: IsLost | None = None,
    ) -> None:
        num_shards, num_layers = placement.num_shards, placement.num_moe_layers
        supported, reason = p2p.supports(message, num_shards, num_layers)
        if not supported:
            raise OptionError(f"ipc: {reason}")
        if not 0 <= router_idx < block.num_routers or num_shards != block.num_shards:
            raise OptionError(
                f"ipc: router {router_idx} with {num_shards} shards, the mailboxes are of {block.num_routers} routers "
                f"and {block.num_shards} shards"
            )
        self.message = message
        self.router_idx = router_idx
        self.num_shards = num_shards
        self.deadline_s = deadline_s
        self._shares_gpu = False
        self._hosted_idx = 0
        self._device, self._block = device, block
        self._host = block.routers[router_idx]
        self._host[:] = 0
        block.refusals[router_idx] = 0
        block.headers[router_idx] = 0
        base = device.map_host(block.address, block.num_bytes)
        self._host_address = base + block.router_address(router_idx)
        mailboxes = [base + block.header_address(router_idx, shard) for shard in range(num_shards)]
        place = device.torch_device
        self._mailboxes = torch.tensor(mailboxes, dtype=torch.int64, device=place)
        self._inboxes = torch.zeros(num_shards, dtype=torch.int64, device=place)
        self._box = device.shared_zeros(message.return_bytes(num_shards))
        self._words = torch.zeros(layout.NUM_WORDS, dtype=torch.int32, device=place)
        self._load = torch.zeros(2, num_layers, placement.num_experts, dtype=torch.int64, device=place)
        self._plan = p2p.Plan.allocate(message.max_tokens, message.top_k, num_shards, place)
        size = (num_layers, placement.num_experts)
        replicas = torch.full((*size, num_shards), -1, dtype=torch.int32, device=place)
        num_replicas = torch.ones(size, dtype=torch.int32, device=place)
        self._tables = p2p.Tables(replicas, num_replicas, placement.slots_per_shard)
        self._opened: list[Mapped | None] = [None] * num_shards
        self._is_closed = False
        self._lost: dict[int, TransportError] = {}
        self._refused: dict[int, TransportError] = {}
        self._rows = self._first = self._begun = 0
        self._asked = np.ones(num_shards, dtype=bool)
        self._is_sent: Callable[[], bool] | None = None
        self.begin_step(message.max_tokens, 0, num_rows=0)
        self.set_placement(placement)
        device.synchronize()
        self._watch = WaitWatch(
            router_idx, self._host, num_shards, deadline_s, is_lost, self.abort, self._note_refusals
        )

    @property
    def buffer_bytes(self) -> int:
        """Of this GPU's memory, whatever the steps bring. The shards' inboxes are theirs."""
        tensors = (self._box, self._words, self._load, self._mailboxes, self._inboxes, self._tables.replicas,
                   self._tables.num_replicas, self._plan.slots, self._plan.owners, self._plan.sent)  # fmt: skip
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def handles(self) -> RouterHandles:
        """For every shard, which answers with its ShardHandles."""
        return RouterHandles(self.router_idx, self.message, self.num_shards, self._device.share(self._box))

    def replace(self, shard_idx: int, handles: ShardHandles) -> None:
        """Between steps: from now on this shard is found there. Raises RuntimeError if its memory cannot be mapped."""
        assert handles.shard_idx == shard_idx
        inbox = self._device.open(handles.inbox)
        self._inboxes[shard_idx] = inbox.data_ptr()
        self._device.synchronize()
        self._opened[shard_idx] = inbox
        self._shares_gpu |= handles.pid == os.getpid()
        self._watch.watch_process(shard_idx, handles.pid)

    def host(self, shard_idx: int, launching_s: Callable[[], float]) -> None:
        """A shard in this process says for how long it has been at a launch: waits end where that waits for them."""
        self._hosted_idx, self._watch.launching_s = shard_idx, launching_s

    def leave_out(self, shards: Collection[int]) -> None:
        """Before the first dispatch: these are reached in another way and get no messages."""
        for shard_idx in shards:
            self._plan.is_sent[shard_idx] = 0
            self._asked[shard_idx] = False
        self._device.synchronize()

    def set_placement(self, placement: Placement) -> None:
        """Between steps. Raises PlacementError for one of other dimensions."""
        tables = self._tables
        shape = (placement.num_moe_layers, placement.num_experts, placement.num_shards)
        if shape != tuple(tables.replicas.shape) or placement.slots_per_shard != tables.slots_per_shard:
            raise PlacementError(
                f"placement has (layers, experts, shards) {shape} and {placement.slots_per_shard} slots per shard, "
                f"expected {tuple(tables.replicas.shape)} and {tables.slots_per_shard}"
            )
        lookup = placement.lookup()
        slots = np.full(shape, -1, dtype=np.int32)
        there = lookup.shard_idx * placement.slots_per_shard + lookup.slot_idx
        slots[:, :, : there.shape[2]] = np.where(lookup.shard_idx >= 0, there, -1)
        tables.replicas.copy_(torch.from_numpy(slots))
        tables.num_replicas.copy_(torch.from_numpy(lookup.num_replicas.copy()))
        generation = placement.generation % layout.NUM_GENERATIONS
        self._words[layout.GENERATION : layout.GENERATION + 1].fill_(generation)
        self._block.generations[self.router_idx] = placement.generation

    def begin_step(self, num_tokens: int, num_decode: int, step: int = 1, num_rows: int | None = None) -> None:
        """The first num_tokens rows of the step's calls are tokens, the first num_decode of them decode. step: its
        number, from 1 on, for `failed_step`. num_rows: those that this router sends in a call, None for all; shards
        have jobs of that size ready when the device begins the step. Launches only."""
        self._num_tokens = num_tokens
        rows = min(num_tokens if num_rows is None else num_rows, self.message.max_tokens)
        self._begun += 1
        begun = layout.pack_begun(self._begun, rows) if rows else 0
        self._device.launch(p2p.begin_step, self._words, self._host_address, num_tokens, num_decode, step, begun)

    def dispatch(
        self, layer_pos: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor,
        first_token: int = 0,
    ) -> None:  # fmt: skip
        """Sends hidden [T, H] bf16 to the shards of logical experts topk_ids int32 [T, K], with topk_weights float32.

        first_token: which of the step's tokens the first row is. Launches only. Raises ValueError for more than
        max_tokens rows.
        """
        if len(hidden) > self.message.max_tokens:
            raise ValueError(f"ipc: {len(hidden)} rows in a call, expected at most {self.message.max_tokens}")
        self._rows, self._first = len(hidden), first_token
        self._device.launch(
            p2p.dispatch_tokens, hidden, topk_ids, topk_weights, self._tables, self._plan, self.message, self._load,
            self._inboxes, self._mailboxes, self._words, layer_pos, first_token,
        )  # fmt: skip
        is_sent = self._shares_gpu and first_token < self._num_tokens and not self._device.is_capturing
        self._is_sent = self._device.mark() if is_sent else None

    @property
    def slots(self) -> torch.Tensor:
        """int32 [T, K] of the last dispatch: shard * slots per shard + slot, -1 for padding."""
        return self._plan.slots[: self._rows]

    def combine(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """The routed sum [T, H] (bf16 or float32) of the last dispatch; rows of padding are zero. What a failed step
        brings is caught by `check`.

        Launches only. Where a shard of this process answers and no graph is captured it returns when all shards have
        launched their answers: what is launched behind a wait may have to be loaded first, for which the GPU must be
        idle; meanwhile this process can launch nothing, and an answer that it still had to launch would never come.
        """
        out = torch.empty(self._rows, self.message.hidden, dtype=dtype, device=self._device.torch_device)
        launch, waiting = self._device.launch, (self._flags, self._words, self._host_address)
        if self._shares_gpu:
            launch(p2p.wait_partials, self._plan, *waiting, self._rows, self._first)
            launch(p2p.combine_partials, self._partials, self._plan, out)
            if (is_sent := self._is_sent) is not None:
                self._device.hold(lambda: is_sent() and self._is_covered())
        else:
            launch(p2p.wait_and_combine, self._partials, self._plan, out, *waiting, self._first)
        return out

    def _is_covered(self) -> bool:
        """Whether every shard has launched its answer to the newest message, or the wait for them ends anyhow."""
        newest = self._block.headers[self.router_idx].astype(np.int32)  # their numbers
        is_covered = newest == self._block.covered[self.router_idx]
        return bool((is_covered | ~self._asked).all() or self._host[layout.ABORT])

    def warm_up(self, dtype: torch.dtype = torch.bfloat16) -> None:
        """Runs the kernels of calls of every size, with padding for rows, which compiles and loads them: neither may be
        left to the time when a wait keeps the device busy. dtype: of what `combine` is to return. Between steps."""
        place, message = self._device.torch_device, self.message
        self.begin_step(0, 0)
        sizes = {min(1 << power, message.max_tokens) for power in range(message.max_tokens.bit_length() + 1)}
        for num_rows in sorted(sizes):
            hidden = torch.zeros(num_rows, message.hidden, dtype=torch.bfloat16, device=place)
            ids = torch.full((num_rows, message.top_k), -1, dtype=torch.int32, device=place)
            self.dispatch(0, hidden, ids, torch.zeros(num_rows, message.top_k, device=place))
            self.combine(dtype)
        self._device.synchronize()

    def check(self) -> None:
        """After a step, when the device is done with it: raises what kept it from being whole (ShardLostError,
        ShardFailedError, DeadlineError). Until `reset` nothing is sent any more."""
        if self.is_disturbed:
            raise self.failure()

    @property
    def is_disturbed(self) -> bool:
        """Whether waits are being given up, from the first sign of a failure until `reset`. From any thread."""
        return bool(self._host[layout.ABORT])

    @property
    def failed_step(self) -> int:
        """The first step since `reset` that has given up a wait, 0 for none. From any thread, when the device is done
        with the steps that are asked for."""
        return int(self._host[layout.FAILED_STEP])

    def failure(self) -> TransportError:
        """Why waits are being given up."""
        for error in (*self._refused.values(), *self._lost.values()):
            return error
        if self._watch.is_stuck:
            return DeadlineError(self._hosted_idx, STUCK_S)
        return next(iter(self._late().values()), DeadlineError(0, self.deadline_s))

    def lost_shards(self) -> dict[int, TransportError]:
        """Those to `replace` before anything is sent again: whose processes ended, and those that were given up; those
        that are late only without any of these."""
        broken = (self._block.refusals[self.router_idx, :, 1] == mailbox.BROKEN).nonzero()[0].tolist()
        lost: dict[int, TransportError] = {shard_idx: _broken(shard_idx) for shard_idx in broken} | self._lost
        for shard_idx in range(self.num_shards):
            if shard_idx not in lost and (reason := self._watch.find_loss(shard_idx)) is not None:
                lost[shard_idx] = ShardLostError(shard_idx, reason)
        return lost or self._late()  # a wait that ends for one shard leaves the others no time

    def _late(self) -> dict[int, TransportError]:
        """Shards that did not answer a wait before it was given up, unless that was for another reason."""
        if self._watch.is_stuck or self._refused:
            return {}
        late = self._host[layout.LATE : layout.LATE + self.num_shards].nonzero()[0]
        return {int(shard_idx): DeadlineError(int(shard_idx), self.deadline_s) for shard_idx in late}

    def _note_refusals(self, seq: int) -> bool:
        """Whether there are any of this very message: what a shard says of one before comes late, when that step has
        ended already. One whose serving has ended answers none."""
        for shard_idx, (refused, code, value) in enumerate(self._block.refusals[self.router_idx].tolist()):
            if code == mailbox.BROKEN:
                self._refused[shard_idx] = _broken(shard_idx)
            elif code and refused == seq:
                self._refused[shard_idx] = ShardFailedError(shard_idx, _refusal(code, value))
        return bool(self._refused)

    def abort(self, shard_idx: int, reason: str) -> None:
        """From any thread: ends the waits of the running step, whose `check` will raise ShardLostError."""
        self._lost.setdefault(shard_idx, ShardLostError(shard_idx, reason))
        self._host[layout.ABORT] = 1

    def reset(self) -> None:
        """After a failed step, when the device is done with it: the next step may begin."""
        self._device.synchronize()
        self._words[layout.FAILED : layout.FAILED + 1].zero_()
        self._device.synchronize()
        with self._watch.lock:
            self._lost.clear()
            self._refused.clear()
            self._host[layout.LATE : layout.LATE + self.num_shards] = 0
            self._host[layout.FAILED_STEP] = 0
            self._watch.is_stuck = False
            self._host[layout.ABORT] = 0

    def take_carried(self) -> Carried:
        """What went out since the last time; between steps."""
        pairs, sent = self._load.cpu().numpy().copy(), self._plan.sent.cpu().numpy().copy()
        self._load.zero_()
        self._plan.sent.zero_()
        return Carried(pairs, sent[:, 0], sent[:, 1])

    def close(self) -> None:
        """Gives up what is awaited. No shard may answer any more."""
        if self._is_closed:
            return
        self._is_closed = True
        self._host[layout.ABORT] = 1
        self._watch.close()
        self._device.synchronize()
        self._opened = [None] * self.num_shards
        self._device.unmap_host(self._block.address)

    @property
    def _flags(self) -> torch.Tensor:
        size = (self.num_shards, self.message.max_tokens)
        return self._box[: 4 * size[0] * size[1]].view(torch.int32).view(size)

    @property
    def _partials(self) -> torch.Tensor:
        message = self.message
        shards = self._box[message.partials_offset(self.num_shards) :].view(self.num_shards, message.partial_bytes)
        rows = shards.view(message.partial_dtype)[:, : message.max_tokens * message.hidden]
        return rows.unflatten(1, (message.max_tokens, message.hidden))


def _refusal(code: int, value: int) -> str:
    if code == mailbox.OUT_OF_GENERATION:
        return f"it does not serve placement generation {value}"
    if code == mailbox.OUT_OF_RANGE:
        return f"a message is for MoE layer {value} or longer than agreed"
    raise AssertionError(code)


def _broken(shard_idx: int) -> ShardLostError:
    return ShardLostError(shard_idx, "its serving thread failed; its log says why")

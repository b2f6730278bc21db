"""Shards of other nodes, asked over sockets in the same layers in which those of the node are asked over ipc.

    slots that the ipc plan chose ─> host ─> Router over sockets ─> partials of these shards, summed ─> device

Shape legend: T tokens of a call, H hidden, K top-k.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from ep.assign import Assigner
from ep.errors import TransportError
from ep.placement import Placement
from ep.router import Router


class FarShards:
    """What an IpcRouter calls of them; for one thread. shards: their indices; router: connected to these at least.

    A failure is kept until `take_failure` and the sum is zero until then: the rest of the step's work goes on, with
    other routers waiting for it perhaps. Tensors of a GPU go through pinned memory, made once for max_tokens.
    """

    def __init__(self, router: Router, shards: Collection[int], max_tokens: int, device: torch.device) -> None:
        self.router = router
        self.shards = frozenset(shards)
        self._device = device
        self._failure: TransportError | None = None
        self._per_shard = router.placement.slots_per_shard
        self._is_far = torch.tensor([shard_idx in self.shards for shard_idx in range(router.placement.num_shards)])
        spec = router.spec
        self._staging: list[torch.Tensor] | None = None
        if device.type != "cpu":
            pairs, rows = (max_tokens, spec.top_k), (max_tokens, spec.hidden_size)
            kinds = ((rows, torch.bfloat16), (pairs, torch.int32), (pairs, torch.float32), (rows, torch.float32))
            self._staging = [torch.empty(shape, dtype=dtype, pin_memory=True) for shape, dtype in kinds]

    def set_placement(self, placement: Placement, assigner: Assigner | None) -> None:
        self.router.set_placement(placement, assigner)

    def dispatch(self, layer_pos: int, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> None:
        """hidden [T, H] bf16, slots int32 [T, K]: global ones, -1 for padding, weights float32 [T, K], on the device.

        Waits for these, but for no shard.
        """
        if self._failure is not None:
            return
        hidden, slots, weights = self._to_host(hidden, slots, weights)
        shards = slots // self._per_shard
        shards[(slots < 0) | ~self._is_far[shards.clamp(min=0).long()]] = -1
        try:
            self.router.dispatch_placed(layer_pos, hidden, shards.numpy(), (slots % self._per_shard).numpy(), weights)
        except TransportError as error:
            self._failure = error

    def combine(self, layer_pos: int, like: torch.Tensor) -> torch.Tensor:
        """The sum [T, H] float32 of these shards' partials, on the device. like: [T, H], zeros of which are the sum of
        nothing."""
        if self._failure is None:
            try:
                return self._to_device(self.router.combine(layer_pos))
            except TransportError as error:
                self._failure = error
        return torch.zeros(like.shape, dtype=torch.float32, device=like.device)

    def take_failure(self) -> TransportError | None:
        """What kept the dispatches since the last time from being answered."""
        failure, self._failure = self._failure, None
        return failure

    def close(self) -> None:
        self.router.close()

    def _to_host(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        if self._staging is None:
            return list(tensors)
        host = [memory[: len(tensor)] for memory, tensor in zip(self._staging, tensors)]
        for memory, tensor in zip(host, tensors):
            memory.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return host

    def _to_device(self, total: torch.Tensor) -> torch.Tensor:
        if self._staging is None:
            return total
        memory = self._staging[-1][: len(total)]
        return memory.copy_(total).to(self._device, non_blocking=True)

"""A shard: a fixed number of expert slots for every MoE layer, and the loop that answers routers. No Ray in it.

Shape legend: T tokens, H hidden, K choices, P pairs (token, slot); ep/wire.py has the order of pairs.
"""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ep.checkpoint import Checkpoint, OnProgress, SlotWeights
from ep.compute import slot_memory
from ep.compute.base import ExpertCompute, Work
from ep.compute.choose import choose_device, keeps_quantized, open_compute
from ep.compute.host_experts import run_table
from ep.errors import PlacementError, WireError
from ep.migration import union
from ep.model import ModelSpec
from ep.placement import Placement
from ep.transport.base import Endpoint, spec_fingerprint
from ep.transport.buffer import DispatchViews, from_raw
from ep.transport.handshake import Identity
from ep.transport.listener import Listener, Request
from ep.transport.scheduling import let_waker_run_on
from ep.wire import Chunk, Dispatch, Fetch

log = logging.getLogger(__name__)
MAX_TOKENS = 65536
"""The most tokens that a router may send at once; its buffers are sized by what it asks for."""
MAX_PASS_TOKENS = 4096
"""Tokens that a GPU computes at once: DeepSeek-V3's work space is 1.2 GB for them."""


@dataclass
class ShardStats:
    """Counted since the shard was loaded. coalesced: requests that shared their pass over the weights with another.
    compute_ns: time in the experts,
    over all passes, the way to a GPU and back included. tokens_of_layer: by position among the MoE layers."""

    shard_idx: int
    generation: int
    num_slots: int
    slot_bytes: int
    requests: int = 0
    tokens: int = 0
    pairs: int = 0
    coalesced: int = 0
    failed: int = 0
    compute_ns: int = 0
    connections: int = 0
    dropped: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    tokens_of_layer: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Asked:
    """One dispatch, as it lies in the connection's memory, and where its partials [T, H] go."""

    message: Dispatch
    views: DispatchViews
    out: torch.Tensor


class Shard:
    """Slots of one shard of a placement, ready to compute. `load` reads them from a checkpoint.

    layers: the slots of one MoE layer after the other, in the spec's order, on a GPU also a layer in several items; FP8
    where `keeps_quantized` says so; their memory is taken over. device: where the experts are computed, by default a
    GPU if torch can use one. max_pass_tokens: tokens that a GPU computes at once. Raises, before the first layer is
    asked for, PlacementError, OptionError, and ModelError where the device's kernels cannot run these experts.
    """

    def __init__(
        self,
        spec: ModelSpec,
        placement: Placement,
        shard_idx: int,
        layers: Iterable[SlotWeights],
        device: torch.device | str | None = None,
        max_pass_tokens: int = MAX_PASS_TOKENS,
    ) -> None:
        if not 0 <= shard_idx < placement.num_shards:
            raise PlacementError(f"shard is {shard_idx}, expected 0 to {placement.num_shards - 1}")
        self.spec = spec
        self.placement = placement
        self.shard_idx = shard_idx
        self._served = {placement.generation: placement}
        self._compute = open_compute(spec, placement.slots_per_shard, choose_device(device), max_pass_tokens)
        num_loaded = 0
        for weights in layers:
            self._keeps_quantized = weights.w13_scale is not None
            self._compute.add_slots(weights)
            num_loaded += weights.num_slots
        assert num_loaded == spec.num_moe_layers * placement.slots_per_shard
        self._compute.finish()
        self._stats = ShardStats(
            shard_idx,
            placement.generation,
            placement.slots_per_shard,
            self._compute.slot_bytes,
            tokens_of_layer=[0] * spec.num_moe_layers,
        )
        self._listener: Listener | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        placement: Placement,
        shard_idx: int,
        dtype: torch.dtype = torch.bfloat16,
        on_progress: OnProgress | None = None,
        device: torch.device | str | None = None,
        max_pass_tokens: int = MAX_PASS_TOKENS,
        coming: Placement | None = None,
        fp8: bool | None = None,
    ) -> Shard:
        """Reads this shard's experts, one layer after the other, for a GPU one expert after the other; dtype is for
        those that are not kept FP8, fp8 says whether an FP8 checkpoint's are (`keeps_quantized`).

        coming: a placement that routers may go over to at any time: its experts are held, and it is admitted, too.
        Raises CheckpointError and what the class raises.
        """
        spec = checkpoint.spec
        slots = (placement.slots if coming is None else union(placement, coming))[:, shard_idx]
        device = choose_device(device)
        at_once = None if device.type == "cpu" else 1
        layers = checkpoint.iter_slots(
            slots, dtype, keeps_quantized(spec, device, fp8), on_progress, device, at_once
        )
        shard = cls(spec, placement, shard_idx, layers, device, max_pass_tokens)
        if coming is not None:
            shard.admit(coming)
        return shard

    @property
    def served(self) -> Mapping[int, Placement]:
        """The placements whose requests are answered, by generation; never changed, but replaced by another."""
        return self._served

    @property
    def generations(self) -> list[int]:
        """Of the placements whose requests are answered."""
        return sorted(self._served)

    def admit(self, placement: Placement) -> None:
        """From now on requests of this placement are answered too; the slots it uses hold its experts by now."""
        assert placement.slots.shape == self.placement.slots.shape
        self._serve_only({**self._served, placement.generation: placement})

    def drop(self, generation: int) -> None:
        """Requests of this placement are refused from now on; no-op if they are already."""
        left = {number: placement for number, placement in self._served.items() if number != generation}
        assert left, "a shard serves some placement"
        self._serve_only(left)

    def _serve_only(self, served: dict[int, Placement]) -> None:
        self._served = served  # replaced, never changed: the serving thread reads it without a lock
        self.placement = served[max(served)]
        self._stats.generation = max(served)

    @property
    def compute(self) -> ExpertCompute:
        """Its slots and the code that runs them."""
        return self._compute

    @property
    def slot_format(self) -> str:
        return self._compute.slot_format

    @property
    def keeps_quantized(self) -> bool:
        """Whether slots are loaded FP8 with scales."""
        return self._keeps_quantized

    def slot_parts(self, layer_pos: int, slot_idx: int) -> list[torch.Tensor]:
        """The memory of one slot, to be written only where no placement that is served uses it."""
        return self._compute.slot_parts(layer_pos, slot_idx)

    def load_slot(self, layer_pos: int, slot_idx: int, weights: SlotWeights) -> None:
        """Overwrites one slot, under the same rule."""
        self._compute.load_slot(layer_pos, slot_idx, weights)

    def read_slot(self, message: Fetch, out: torch.Tensor) -> Chunk:
        """Fills out with bytes of a slot that a served placement uses. Raises WireError."""
        placement = self.placement
        if message.layer_pos >= placement.num_moe_layers or message.slot_idx >= placement.slots_per_shard:
            raise WireError(f"slot {message.slot_idx} of MoE layer {message.layer_pos} is asked for: there is none")
        parts = self.slot_parts(message.layer_pos, message.slot_idx)
        total = slot_memory.num_bytes(parts)
        if message.offset + message.length > total:
            raise WireError(f"bytes {message.offset} + {message.length} of a slot of {total} are asked for")
        slot_memory.read(parts, message.offset, out)
        return Chunk(message.seq, total, zlib.crc32(out.numpy().data), self.slot_format)

    @property
    def compute_path(self) -> str:
        """The chosen way to compute the experts, in a word."""
        return self._compute.path

    @property
    def compute_reason(self) -> str:
        """Why that one."""
        return self._compute.reason

    def forward(self, layer_pos: int, x: torch.Tensor, slot_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, H], slot_ids int [T, K] (-1 for none), weights float32 [T, K] -> partials float32 [T, H]."""
        out = torch.empty(x.shape, dtype=torch.float32)
        run_table(self._compute, layer_pos, x, None, slot_ids, weights, out)
        return out

    def answer(self, message: Dispatch, views: DispatchViews, out: torch.Tensor) -> int:
        """Computes one dispatch into out [T, H]; returns the nanoseconds it took. Raises WireError."""
        return self._answer(message.layer_pos, [Asked(message, views, out)])

    def listen(
        self,
        key: bytes,
        node_id: str,
        host: str | None = None,
        unix_dir: str | Path | None = None,
        num_threads: int = 1,
        max_tokens: int = MAX_TOKENS,
    ) -> Endpoint:
        """Starts answering routers that know `key`, on a daemon thread with num_threads torch threads; returns at once.

        TCP on host, this node's own address, if given; unix socket in unix_dir (mode 0700, a temporary folder if None).
        Raises OptionError.
        """
        assert self._listener is None, "already listening"
        identity = Identity(
            self.shard_idx,
            spec_fingerprint(self.spec),
            self.spec.hidden_size,
            self.placement.generation,
            self.placement.slots_per_shard,
            max_tokens,
        )
        listener = Listener(identity, key)
        listener.slots = self
        endpoint = listener.open(node_id, unix_dir, host)
        self._listener = listener
        self._thread = threading.Thread(
            target=self._serve, args=(listener, num_threads), name=f"ep-shard-{self.shard_idx}", daemon=True
        )
        self._thread.start()
        return endpoint

    def status(self) -> dict[str, Any]:
        """`stats` and how the experts are computed, as plain values."""
        compute = {"compute_path": self.compute_path, "compute_reason": self.compute_reason}
        return asdict(self.stats()) | compute

    def stats(self) -> ShardStats:
        """A copy; may be called from any thread."""
        values = asdict(self._stats)
        if self._listener is not None:
            traffic = self._listener.stats
            values.update(
                connections=traffic.connections,
                dropped=traffic.dropped,
                bytes_in=traffic.bytes_in,
                bytes_out=traffic.bytes_out,
            )
        return ShardStats(**values)

    def close(self) -> None:
        """Stops answering: waits for the computation under way, then ends every connection."""
        if self._listener is not None and self._thread is not None:
            self._listener.close()
            self._thread.join()

    def _serve(self, listener: Listener, num_threads: int) -> None:
        let_waker_run_on()
        torch.set_num_threads(num_threads)  # OpenMP keeps this per thread, so it is set on the one that computes
        try:
            with torch.inference_mode():
                while not listener.is_closed:
                    by_layer: dict[int, list[Request]] = {}
                    for request in listener.wait():
                        by_layer.setdefault(request.message.layer_pos, []).append(request)
                    for layer_pos, requests in by_layer.items():
                        self._answer_all(listener, layer_pos, requests)
        except Exception:
            log.exception("shard %d: stops serving", self.shard_idx)
            listener.close()
        finally:  # routers learn at once that no answer will come
            listener.hang_up()

    def _answer_all(self, listener: Listener, layer_pos: int, requests: list[Request]) -> None:
        try:
            compute_ns = self._answer(layer_pos, [Asked(r.message, r.views, r.out) for r in requests])
        except Exception as error:
            if len(requests) > 1:  # one router's mistake is not the others'
                for request in requests:
                    self._answer_all(listener, layer_pos, [request])
                return
            if not isinstance(error, WireError):
                log.exception("shard %d: layer %d failed", self.shard_idx, layer_pos)
            self._stats.failed += 1
            listener.fail(requests[0], str(error) or type(error).__name__)
            return
        for request in requests:
            listener.answer(request, compute_ns)

    def _answer(self, layer_pos: int, asked: Sequence[Asked]) -> int:
        num_layers = self.spec.num_moe_layers
        if layer_pos >= num_layers:
            raise WireError(f"MoE layer is {layer_pos}, expected 0 to {num_layers - 1}")
        works = [self._check(one) for one in asked]
        start = time.perf_counter_ns()
        self._compute.run(layer_pos, works)
        compute_ns = time.perf_counter_ns() - start
        stats = self._stats
        tokens = sum(one.message.num_tokens for one in asked)
        stats.requests += len(asked)
        stats.coalesced += len(asked) if len(asked) > 1 else 0
        stats.tokens += tokens
        stats.pairs += sum(one.message.num_pairs for one in asked)
        stats.compute_ns += compute_ns
        stats.tokens_of_layer[layer_pos] += tokens
        return compute_ns

    def _check(self, asked: Asked) -> Work:
        message, views = asked.message, asked.views
        if message.generation not in self._served:
            raise WireError(f"placement generation is {message.generation}, expected one of {self.generations}")
        # Checked and used from memory that the router cannot reach: the op does not check what it indexes with.
        counts, slot_ids = views.counts.copy(), views.slot_ids.copy()
        if counts.min() < 1 or counts.max() > self.spec.top_k or counts.sum(dtype=np.int64) != len(slot_ids):
            raise WireError(f"counts are not those of {len(slot_ids)} pairs, 1 to {self.spec.top_k} for each token")
        if slot_ids.view(np.uint32).max() >= self.placement.slots_per_shard:  # a negative id is a huge unsigned one
            raise WireError(f"a slot is out of range, expected 0 to {self.placement.slots_per_shard - 1}")
        scales = None if views.scales is None else torch.from_numpy(views.scales)
        return Work(from_raw(views.rows, message.dtype), scales, counts, slot_ids, views.weights, asked.out)

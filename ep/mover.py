"""Fills a shard's empty slots while it serves: from a peer that holds the expert, from the checkpoint where none does.

    fetch ─> checksum on arrival ─> write ─> read back ─> admit the placement ─> probe ─> done
Serving comes first: after each slot the mover rests for a multiple of the time that the slot took.

Shape legend: T probe tokens, H hidden.
"""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ep.checkpoint import Checkpoint
from ep.compute import slot_memory
from ep.errors import ClusterError
from ep.kernels.reference import Experts, experts_forward
from ep.migration import Transfer
from ep.placement import Placement
from ep.shard import Shard
from ep.transport.base import Endpoint, spec_fingerprint
from ep.transport.buffer import DispatchViews, to_raw
from ep.transport.handshake import Greeting
from ep.transport.peer import Peer
from ep.wire import Dispatch

log = logging.getLogger(__name__)
CHUNK_BYTES = 1 << 18
"""A peer copies so much between two requests of a router."""
REST = 4.0
PROBE_TOKENS = 4
PROBE_BOUND = 8e-2
"""Relative error of a probe against the checkpoint's weights in float32. FP8 activations on rows as short as a toy
model's reach 7e-2; another expert's weights give more than 1."""
MAX_PROBES = 32
"""Slots tried after a move; all others are held to their checksums."""


@dataclass(frozen=True)
class Moved:
    """What one shard took in. seconds: of the copies alone, without the rests between them."""

    from_peers: int = 0
    from_disk: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    probed: int = 0


class Mover:
    """For one shard; its methods may run beside the thread that serves. endpoints: of all shards, by index. rest:
    seconds of rest for each second of work."""

    def __init__(
        self, shard: Shard, checkpoint: Checkpoint, key: bytes, node_id: str, rest: float = REST
    ) -> None:
        self._shard = shard
        self._checkpoint = checkpoint
        self._key = key
        self._node_id = node_id
        self._rest_factor = rest
        self._preparing = threading.Lock()

    def prepare(self, placement: Placement, transfers: Sequence[Transfer], endpoints: Sequence[Endpoint]) -> Moved:
        """Fills the slots of `transfers` and admits the placement that uses them.

        One placement after the other: two moves may want the same empty slot. Raises ShardLostError or ShardFailedError
        for a peer that fails half-way, ClusterError where a slot does not compute what the checkpoint's expert does;
        the placement is then not served.
        """
        with self._preparing:
            return self._prepare(placement, transfers, endpoints)

    def link_speed(self, layer_pos: int, slot_idx: int, endpoint: Endpoint) -> float:
        """Bytes per second of reading one slot of a peer, as a move would."""
        peer = self._open(endpoint)
        try:
            start = time.monotonic()
            num_bytes = sum(len(data) for data in self._chunks(peer, layer_pos, slot_idx))
            return num_bytes / (time.monotonic() - start)
        finally:
            peer.close()

    def _prepare(self, placement: Placement, transfers: Sequence[Transfer], endpoints: Sequence[Endpoint]) -> Moved:
        moved = Moved()
        peers: dict[int, Peer] = {}
        try:
            for transfer in transfers:
                moved = self._take_in(transfer, endpoints, peers, moved)
        finally:
            for peer in peers.values():
                peer.close()
        self._shard.admit(placement)
        try:
            probed = self._probe(placement, transfers, endpoints[self._shard.shard_idx])
        except Exception:
            self._shard.drop(placement.generation)
            raise
        return Moved(moved.from_peers, moved.from_disk, moved.num_bytes, moved.seconds, probed)

    def _take_in(
        self, transfer: Transfer, endpoints: Sequence[Endpoint], peers: dict[int, Peer], moved: Moved
    ) -> Moved:
        start = time.monotonic()
        parts = self._shard.slot_parts(transfer.layer_pos, transfer.to_slot)
        num_bytes = slot_memory.num_bytes(parts)
        from_peer = transfer.from_shard >= 0
        if from_peer:
            if transfer.from_shard not in peers:
                peers[transfer.from_shard] = self._open(endpoints[transfer.from_shard])
            self._copy(peers[transfer.from_shard], transfer, parts)
        else:
            self._read(transfer)
        seconds = time.monotonic() - start
        self._rest(seconds)
        return Moved(
            moved.from_peers + from_peer,
            moved.from_disk + (not from_peer),
            moved.num_bytes + num_bytes,
            moved.seconds + seconds,
        )

    def _copy(self, peer: Peer, transfer: Transfer, parts: list[torch.Tensor]) -> None:
        sent = written = offset = 0
        for data in self._chunks(peer, transfer.layer_pos, transfer.from_slot):
            slot_memory.write(parts, offset, data)
            sent = zlib.crc32(data.numpy().data, sent)
            back = torch.empty_like(data)
            slot_memory.read(parts, offset, back)
            written = zlib.crc32(back.numpy().data, written)
            offset += len(data)
        if sent != written:
            raise ClusterError(f"shard {self._shard.shard_idx}: {transfer} reads back otherwise than it was sent")

    def _chunks(self, peer: Peer, layer_pos: int, slot_idx: int) -> Iterator[torch.Tensor]:
        """A peer's slot, piece by piece."""
        total = slot_memory.num_bytes(self._shard.slot_parts(0, 0))
        for offset in range(0, total, peer.max_chunk):
            chunk, data = peer.fetch(layer_pos, slot_idx, offset, min(peer.max_chunk, total - offset))
            if (chunk.slot_bytes, chunk.format) != (total, self._shard.slot_format):
                raise ClusterError(
                    f"a peer's slots are {chunk.slot_bytes} bytes of {chunk.format!r}, "
                    f"shard {self._shard.shard_idx} has {total} of {self._shard.slot_format!r}"
                )
            yield data

    def _read(self, transfer: Transfer) -> None:
        shard, spec = self._shard, self._shard.spec
        slot = self._checkpoint.allocate_slots(1, torch.bfloat16, shard.keeps_quantized)
        self._checkpoint.read_slots(spec.moe_layers[transfer.layer_pos], [transfer.expert_idx], slot)
        shard.load_slot(transfer.layer_pos, transfer.to_slot, slot)

    def _probe(self, placement: Placement, transfers: Sequence[Transfer], endpoint: Endpoint) -> int:
        """Asks the shard for new slots' partials, over its socket as a router does."""
        if not transfers:
            return 0
        step = max(1, len(transfers) // MAX_PROBES)
        peer = self._open(endpoint)
        try:
            chosen = transfers[::step][:MAX_PROBES]
            for transfer in chosen:
                start = time.monotonic()
                error = self._probe_error(peer, placement.generation, transfer)
                self._rest(time.monotonic() - start)
                if not error <= PROBE_BOUND:
                    raise ClusterError(
                        f"shard {self._shard.shard_idx}: slot {transfer.to_slot} of MoE layer {transfer.layer_pos} "
                        f"does not compute expert {transfer.expert_idx}: relative error {error:.3g}, "
                        f"expected at most {PROBE_BOUND:g}"
                    )
        finally:
            peer.close()
        return len(chosen)

    def _probe_error(self, peer: Peer, generation: int, transfer: Transfer) -> float:
        spec = self._shard.spec
        x = torch.randn(PROBE_TOKENS, spec.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()

        def fill(views: DispatchViews) -> None:
            views.counts.fill(1)
            views.slot_ids.fill(transfer.to_slot)
            views.weights.fill(1)
            views.rows[:] = to_raw(x, "bf16")

        message = Dispatch(1, generation, transfer.layer_pos, "bf16", "f32", PROBE_TOKENS, PROBE_TOKENS)
        got = peer.compute(message, fill)
        slot = self._checkpoint.allocate_slots(1, torch.float32)
        self._checkpoint.read_slots(spec.moe_layers[transfer.layer_pos], [transfer.expert_idx], slot)
        ids, weights = torch.zeros(PROBE_TOKENS, 1, dtype=torch.int32), torch.ones(PROBE_TOKENS, 1)
        wanted = experts_forward(x.float(), ids, weights, Experts(slot.w13, slot.w2))
        return ((got - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()

    def _open(self, endpoint: Endpoint) -> Peer:
        spec = self._shard.spec
        max_tokens = max(PROBE_TOKENS, CHUNK_BYTES // (4 * spec.hidden_size))
        greeting = Greeting(
            f"shard-{self._shard.shard_idx}", spec_fingerprint(spec), spec.hidden_size, max_tokens, spec.top_k
        )
        return Peer(endpoint, greeting, self._key, self._node_id)

    def _rest(self, seconds: float) -> None:
        """Leaves the cores, and this process's interpreter, to those who serve."""
        time.sleep(self._rest_factor * seconds)

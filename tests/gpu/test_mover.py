"""An expert that moves between two shards on a GPU, over a socket, while both are asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ep.checkpoint import Checkpoint
from ep.kernels.reference import Experts, experts_forward
from ep.migration import DISK, Transfer
from ep.mover import Mover
from ep.placement import Placement, even_split, with_spares
from ep.router import Router
from ep.shard import Shard
from ep.transport.handshake import Greeting
from ep.transport.sockets import SocketTransport
from tests.cases import small_checkpoint, small_config
from tests.unit.shards import KEY, NODE, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
SIZES = {
    "deepseek_v3": {"hidden_size": 1024, "moe_intermediate_size": 512},
    "mixtral": {"hidden_size": 1024, "intermediate_size": 1792, "num_attention_heads": 8},
}


@pytest.mark.parametrize("family", SIZES)
def test_slots_from_a_peer_and_from_the_checkpoint(family: str, tmp_path: Path) -> None:
    config = small_config(family, **SIZES[family])
    checkpoint = Checkpoint(small_checkpoint(tmp_path / "model", family, config))
    spec = checkpoint.spec
    placement = with_spares(even_split(spec.num_moe_layers, spec.num_experts, 2), 2)
    shards = [Shard.load(checkpoint, placement, idx, device="cuda", max_pass_tokens=64) for idx in range(2)]
    endpoints = [shard.listen(KEY, NODE, unix_dir=tmp_path / "s") for shard in shards]
    router = Router(spec, placement, SocketTransport(endpoints, Greeting.of(spec, "router-0", 64), KEY, NODE))
    layer_pos = spec.num_moe_layers - 1
    slots = checkpoint.allocate_slots(spec.num_experts, torch.float32)
    checkpoint.read_slots(spec.moe_layers[layer_pos], list(range(spec.num_experts)), slots)
    dense = Experts(slots.w13.double(), slots.w2.double())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(32, spec.hidden_size, generator=generator).bfloat16()
    weights, ids = torch.rand(32, spec.num_experts, generator=generator).topk(spec.top_k, dim=-1)
    wanted = experts_forward(hidden.double(), ids.int(), weights, dense)

    def error() -> float:
        return relative_error(router.moe(layer_pos, hidden, ids.int(), weights), wanted)

    at_first = error()
    assert at_first < 8e-2
    free = placement.slots_per_shard - 2
    after = placement.slots.copy()
    transfers = []
    for to_slot, source in ((free, 0), (free + 1, DISK)):
        expert = int(placement.slots[layer_pos, 0, to_slot - free])
        after[layer_pos, 1, to_slot] = expert
        from_slot = to_slot - free if source == 0 else DISK
        transfers.append(Transfer(layer_pos, expert, 1, to_slot, source, from_slot))
    both = Placement(1, spec.num_experts, after)
    movers = [Mover(shard, checkpoint, KEY, NODE, rest=0) for shard in shards]
    assert movers[0].prepare(both, [], endpoints).probed == 0
    moved = movers[1].prepare(both, transfers, endpoints)
    assert (moved.from_peers, moved.from_disk, moved.probed) == (1, 1, 2)
    alone = after.copy()
    alone[layer_pos, 0, :2] = -1  # from now on the moved experts are on shard 1 only
    router.set_placement(both)
    assert error() < 8e-2
    last = Placement(2, spec.num_experts, alone)
    for shard in shards:
        shard.admit(last)
    router.set_placement(last)
    assert error() < 8e-2
    router.close()
    for shard in shards:
        shard.close()

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ep.checkpoint import Checkpoint
from ep.errors import PlacementError
from ep.placement import even_split
from ep.shard import Shard
from ep.transport.buffer import to_raw
from ep.transport.handshake import Greeting
from ep.transport.sockets import SocketTransport
from ep.wire import Dispatch
from tests.unit.shards import (
    KEY,
    NODE,
    NUM_EXPERTS,
    NUM_LAYERS,
    SlowShard,
    even_shard,
    expected,
    make_experts,
    make_shard,
    make_spec,
    random_routing,
    relative_error,
)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_partials_of_all_shards_add_up_to_the_reference(dtype: torch.dtype, bound: float) -> None:
    spec = make_spec()
    experts = make_experts(spec, dtype)
    hidden, ids, weights = random_routing(spec, 21)
    total = torch.zeros(21, spec.hidden_size)
    for shard_idx in range(3):
        placement = even_split(NUM_LAYERS, NUM_EXPERTS, 3)
        shard = make_shard(spec, placement, shard_idx, experts)
        slots = torch.full_like(ids, -1)
        for slot, expert in enumerate(placement.slots[1, shard_idx].tolist()):
            slots[ids == expert] = slot
        total += shard.forward(1, hidden.to(dtype), slots, weights)
    assert relative_error(total, expected(experts[1], hidden.to(dtype), ids, weights)) <= bound


def test_a_shard_without_work_answers_zeros() -> None:
    shard = even_shard(0, 2, torch.bfloat16)
    hidden, ids, weights = random_routing(shard.spec, 5)
    assert torch.equal(shard.forward(0, hidden.bfloat16(), ids * 0 - 1, weights), torch.zeros(5, 64))


def test_the_compute_path_and_its_reason_are_readable() -> None:
    shard = even_shard(0, 2, torch.float32)
    assert shard.compute_path == "sorted_torch" and "float32" in shard.compute_reason
    status = shard.status()
    assert status["compute_path"] == "sorted_torch" and status["num_slots"] == 4
    assert status["slot_bytes"] == NUM_LAYERS * 4 * shard.spec.expert_params * 4


def test_a_shard_that_the_placement_has_not_is_refused() -> None:
    with pytest.raises(PlacementError, match="shard is 2, expected 0 to 1"):
        Shard(make_spec(), even_split(NUM_LAYERS, NUM_EXPERTS, 2), 2, [])


def test_requests_that_wait_for_one_layer_are_computed_together(tmp_path: Path) -> None:
    shard = even_shard(0, 1, torch.bfloat16, SlowShard)
    endpoint = shard.listen(KEY, NODE, unix_dir=tmp_path / "s")
    spec, deadline = shard.spec, time.monotonic() + 30
    transports = [SocketTransport([endpoint], Greeting.of(spec, str(idx), 16), KEY, NODE) for idx in range(4)]
    for seq, transport in enumerate(transports):
        views = transport.prepare(0, Dispatch(1, 0, 0, "bf16", "f32", 1, 1), deadline)
        views.counts[:] = 1
        views.slot_ids[:] = seq
        views.weights[:] = 1.0
        views.rows[:] = to_raw(torch.full((1, 64), seq + 1.0), "bf16")
        transport.dispatch(0)
    found = [transport.receive(deadline).rows.clone() for transport in transports]
    for seq, rows in enumerate(found):
        alone = shard.forward(0, torch.full((1, 64), seq + 1.0).bfloat16(), torch.tensor([[seq]]), torch.ones(1, 1))
        assert torch.equal(rows, alone)
    stats = shard.stats()
    assert stats.requests == 4 and stats.coalesced >= 2
    for transport in transports:
        transport.close()
    shard.close()


def write_checkpoint(folder: Path) -> Checkpoint:
    """A Mixtral checkpoint with the experts of `make_experts` in bf16."""
    spec = make_spec()
    (folder / "config.json").write_text(
        '{"architectures": ["MixtralForCausalLM"], "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 32,'
        '"num_local_experts": 8, "num_experts_per_tok": 4, "num_hidden_layers": 2, "num_attention_heads": 2,'
        '"num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 128, "rms_norm_eps": 1e-5}'
    )
    tensors = {}
    for layer_idx, experts in zip(spec.moe_layers, make_experts(spec, torch.bfloat16), strict=True):
        for expert_idx in range(NUM_EXPERTS):
            gate, up, down = spec.expert_tensors(layer_idx, expert_idx)
            w1, w3 = experts.w13[expert_idx].chunk(2)
            tensors |= {gate.name: w1.clone(), up.name: w3.clone(), down.name: experts.w2[expert_idx].clone()}
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder)


def test_a_shard_loaded_from_a_checkpoint_computes_its_experts(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    placement = even_split(NUM_LAYERS, NUM_EXPERTS, 2)
    seen: list[tuple[int, int]] = []
    loaded = Shard.load(checkpoint, placement, 1, on_progress=lambda *counts: seen.append(counts), device="cpu")
    made = make_shard(checkpoint.spec, placement, 1, make_experts(checkpoint.spec, torch.bfloat16))
    hidden, ids, weights = random_routing(checkpoint.spec, 12)
    slots = torch.where(ids >= 4, ids - 4, -1)
    for layer_pos in range(NUM_LAYERS):
        ours = loaded.forward(layer_pos, hidden.bfloat16(), slots, weights)
        assert torch.equal(ours, made.forward(layer_pos, hidden.bfloat16(), slots, weights))
    assert seen[-1] == (NUM_LAYERS * 4, NUM_LAYERS * 4)


MEASURE = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.unit.shards import NUM_EXPERTS, make_spec
from ep.checkpoint import SlotWeights
from ep.placement import even_split
from ep.shard import Shard

LAYERS = 8  # the allocator keeps a few slots' worth of what packing has freed

def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

def layers(size):
    for _ in range(LAYERS):
        shapes = (NUM_EXPERTS, 2 * size, size), (NUM_EXPERTS, size, size)
        yield SlotWeights(*(torch.ones(shape, dtype=torch.bfloat16) for shape in shapes))

torch.set_num_threads(1)
placement = even_split(LAYERS, NUM_EXPERTS, 1)
small, large = (make_spec(size, size, num_layers=LAYERS) for size in (64, 1024))
Shard(small, placement, 0, layers(64), "cpu")  # libraries are loaded once and are no slots
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = memory("VmRSS")
shard = Shard(large, placement, 0, layers(1024), "cpu")
print((memory("VmHWM") - before) * 1024 / shard.stats().slot_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_making_a_shard_takes_its_slots_and_little_more() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(Path(__file__).parents[2])], capture_output=True, text=True, check=True
    )
    assert 0.9 < float(done.stdout) < 1.25

"""Weights that are made on a GPU: the bits that a CPU makes, in the slots themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ep.checkpoint import Checkpoint
from ep.kernels.devices import current_device
from ep.made_slice import write_made
from ep.made_values import NORMAL, fill, make_key
from ep.placement import even_split
from ep.shard import Shard
from tests.cases import small_config

FAMILIES = ("deepseek_v3", "mixtral")


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).cpu()


def make(folder: Path, family: str) -> Checkpoint:
    write_made(small_config(family, hidden_size=256, num_attention_heads=4, intermediate_size=128), folder, seed=3)
    return Checkpoint(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_the_cpus_bits(family: str, tmp_path: Path) -> None:
    checkpoint = make(tmp_path, family)
    for name in checkpoint.tensor_names():
        assert torch.equal(raw(checkpoint.read_tensor(name, "cuda")), raw(checkpoint.read_tensor(name))), name
        dequantized = checkpoint.read_dequantized(name, "cuda")
        assert torch.equal(raw(dequantized), raw(checkpoint.read_dequantized(name))), name


def test_a_tensor_of_several_chunks_has_the_cpus_bits() -> None:
    table = torch.tensor(NORMAL).bfloat16()
    found = [torch.empty((2 << 24) + 12345, dtype=torch.bfloat16, device=device) for device in ("cpu", "cuda")]
    for out in found:
        fill(out, table, make_key(0, "a large one"))
    assert torch.equal(raw(found[0]), raw(found[1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_are_filled_with_what_a_cpu_reads(family: str, tmp_path: Path) -> None:
    checkpoint = make(tmp_path, family)
    spec = checkpoint.spec
    quantized = spec.quant_block is not None
    if quantized and current_device().fp8_dtype != torch.float8_e4m3fn:
        pytest.skip("FP8 weights are held in another format")
    placement = even_split(spec.num_moe_layers, spec.num_experts, 2)
    shard = Shard.load(checkpoint, placement, 1, max_pass_tokens=32)
    for layer_pos, layer_idx in enumerate(spec.moe_layers):
        for slot_idx, expert_idx in enumerate(placement.slots[layer_pos, 1].tolist()):
            wanted = checkpoint.allocate_slots(1, keep_quantized=quantized)
            checkpoint.read_slots(layer_idx, [expert_idx], wanted)
            tensors = (wanted.w13, wanted.w2, wanted.w13_scale, wanted.w2_scale)
            stored = [tensor[0] for tensor in tensors if tensor is not None]
            for part, tensor in zip(shard.slot_parts(layer_pos, slot_idx), stored, strict=True):
                assert torch.equal(raw(part), raw(tensor))

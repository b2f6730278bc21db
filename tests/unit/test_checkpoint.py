"""Checkpoints: what is read is what was stored, only that is read, and every defect is one line with its path."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ep.checkpoint import INDEX_FILE, Checkpoint, write_dequantized
from ep.errors import CheckpointError, ModelError
from ep.kernels.reference import dequantize_blocks
from ep.placement import EMPTY, even_split
from ep.stored_tensors import SINGLE_FILE
from tests.cases import small_checkpoint, small_config

FAMILIES = ("deepseek_v3", "mixtral")
LAYER = 1


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: small_checkpoint(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture
def deepseek(paths: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(paths["deepseek_v3"], tmp_path / "model"))


def stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors, read by the safetensors library."""
    tensors = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return tensors


def dequantized(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    scale = stored.get(f"{name}_scale_inv")
    return stored[name].float() if scale is None else dequantize_blocks(stored[name], scale)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slots_hold_the_experts_of_the_placement(paths: dict[str, Path], family: str, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint(paths[family])
    checkpoint.check()
    stored = stored_tensors(paths[family])
    spec = checkpoint.spec
    placement = even_split(spec.num_moe_layers, spec.num_experts, 3)
    for shard_idx in range(3):
        slots = placement.slots[:, shard_idx]
        steps: list[tuple[int, int]] = []
        layers = list(checkpoint.iter_slots(slots, dtype, on_progress=lambda *step, steps=steps: steps.append(step)))
        total = int((slots != EMPTY).sum())
        assert steps == [(i + 1, total) for i in range(total)]
        for layer_idx, experts, weights in zip(spec.moe_layers, slots, layers, strict=True):
            for slot, expert in enumerate(experts):
                if expert == EMPTY:
                    assert not weights.w13[slot].any() and not weights.w2[slot].any()
                    continue
                gate, up, down = spec.expert_tensors(layer_idx, int(expert))
                w13 = torch.cat([dequantized(stored, gate.name), dequantized(stored, up.name)])
                assert torch.equal(weights.w13[slot], w13.to(dtype))
                assert torch.equal(weights.w2[slot], dequantized(stored, down.name).to(dtype))


def test_quantised_slots_keep_every_bit(paths: dict[str, Path]) -> None:
    checkpoint = Checkpoint(paths["deepseek_v3"])
    stored = stored_tensors(checkpoint.path)
    out = checkpoint.allocate_slots(3, keep_quantized=True)
    checkpoint.read_slots(LAYER, [5, EMPTY, 2], out)
    assert out.w13_scale is not None and out.w2_scale is not None
    for slot, expert in ((0, 5), (2, 2)):
        gate, up, down = checkpoint.spec.expert_tensors(LAYER, expert)
        assert torch.equal(
            out.w13[slot].view(torch.uint8), torch.cat([stored[gate.name], stored[up.name]]).view(torch.uint8)
        )
        assert torch.equal(out.w13_scale[slot], torch.cat([stored[f"{t.name}_scale_inv"] for t in (gate, up)]))
        assert torch.equal(out.w2[slot].view(torch.uint8), stored[down.name].view(torch.uint8))
        assert torch.equal(out.w2_scale[slot], stored[f"{down.name}_scale_inv"])
    for tensor in (out.w13.float(), out.w2.float(), out.w13_scale, out.w2_scale):
        assert not tensor[1].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_gate(paths: dict[str, Path], family: str) -> None:
    checkpoint = Checkpoint(paths[family])
    stored = stored_tensors(paths[family])
    gate = checkpoint.read_gate(LAYER)
    names = checkpoint.spec.gate_tensors(LAYER)
    assert torch.equal(gate.weight, stored[names.weight.name])
    assert (gate.bias is None) == (family == "mixtral")
    if gate.bias is not None and names.bias is not None:
        assert gate.bias.dtype == torch.float32 and torch.equal(gate.bias, stored[names.bias.name])


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_reads_like_many(paths: dict[str, Path], family: str, tmp_path: Path) -> None:
    shutil.copy(paths[family] / "config.json", tmp_path)
    save_file(stored_tensors(paths[family]), tmp_path / SINGLE_FILE)
    single, many = Checkpoint(tmp_path), Checkpoint(paths[family])
    single.check()
    assert sorted(single.tensor_names()) == sorted(many.tensor_names())
    assert torch.equal(single.read_expert(LAYER, 3).w13, many.read_expert(LAYER, 3).w13)


def test_dequantised_copy_has_the_same_values(paths: dict[str, Path], tmp_path: Path) -> None:
    source = paths["deepseek_v3"]
    write_dequantized(source, tmp_path)
    stored, copied = stored_tensors(source), stored_tensors(tmp_path)
    assert copied.keys() == {name for name in stored if not name.endswith("_scale_inv")}
    for name, tensor in copied.items():
        assert tensor.dtype == (torch.float32 if name.endswith("_bias") else torch.bfloat16)
        assert torch.equal(tensor.float(), dequantized(stored, name).to(tensor.dtype).float()), name
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert (tmp_path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    again = Checkpoint(tmp_path)
    again.check()
    assert torch.equal(again.read_expert(LAYER, 0).w2, Checkpoint(source).read_expert(LAYER, 0).w2)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Changes the tensors of the file that holds the MoE layer; the index stays as it was."""
    file = path / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


UP = "model.layers.1.mlp.experts.3.up_proj.weight"
GATE = "model.layers.1.mlp.gate.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), f"tensor {UP} is missing, though {INDEX_FILE} says that it is here"),
        (lambda t: t.pop(GATE), f"tensor {GATE} is missing"),
        (lambda t: t.update({UP: t[UP][:64].clone()}), f"{UP} has shape [64, 192], expected [128, 192]"),
        (lambda t: t.update({UP: t[UP].bfloat16()}), f"{UP} has dtype BF16, expected F8_E4M3"),
        (
            lambda t: t.update({f"{UP}_scale_inv": torch.ones(2, 1)}),
            f"{UP}_scale_inv has shape [2, 1], expected [1, 2]",
        ),
        (lambda t: t.update({GATE: t[GATE][:8].clone()}), f"{GATE} has shape [8, 192], expected [16, 192]"),
        (lambda t: t.update({GATE: t[GATE].double()}), f"{GATE} has dtype F64, expected one of"),
    ],
)
def test_wrong_tensor_is_named(deepseek: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str) -> None:
    rewrite(deepseek, change)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(deepseek).check()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(deepseek / "model-00002-of-00003.safetensors"))


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_file_is_named(deepseek: Path, size: int) -> None:
    file = deepseek / "model-00002-of-00003.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=f"^{file}: truncated: {len(data[:size])} bytes") as caught:
        Checkpoint(deepseek).check()
    assert size != -1 or f"expected {len(data)}" in str(caught.value)


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [4]}}', b"\xff"])
def test_file_that_is_no_safetensors(deepseek: Path, header: bytes) -> None:
    file = deepseek / "model-00002-of-00003.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=f"^{file}: not a safetensors file: "):
        Checkpoint(deepseek).check()


def test_shape_that_does_not_fit_its_bytes(deepseek: Path) -> None:
    file = deepseek / "model-00002-of-00003.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(CheckpointError, match=r"a has 12 bytes, expected F32 \[4\]"):
        Checkpoint(deepseek).check()


def test_missing_files_are_named(deepseek: Path, tmp_path: Path) -> None:
    index = json.loads((deepseek / INDEX_FILE).read_text())
    del index["weight_map"][UP]
    (deepseek / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"^{deepseek}: tensor {UP} is missing$"):
        Checkpoint(deepseek).read_expert(LAYER, 3)
    (deepseek / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: no such file"):
        Checkpoint(deepseek).check()
    (deepseek / INDEX_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{INDEX_FILE}: no weight_map"):
        Checkpoint(deepseek)
    (deepseek / INDEX_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"holds neither {INDEX_FILE} nor {SINGLE_FILE}"):
        Checkpoint(deepseek)
    with pytest.raises(ModelError, match="no such file"):
        Checkpoint(tmp_path / "nowhere")


def test_quantised_slots_of_a_bf16_checkpoint_are_refused(paths: dict[str, Path]) -> None:
    with pytest.raises((CheckpointError, ModelError), match="quant"):
        Checkpoint(paths["mixtral"]).allocate_slots(1, keep_quantized=True)


MEASURE_PEAK = """
import resource, sys
import torch
from ep.checkpoint import Checkpoint
import numpy as np
checkpoint = Checkpoint(sys.argv[1])
experts = np.arange(checkpoint.spec.num_experts)[None, ::2]
checkpoint.read_expert(0, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
layers = list(checkpoint.iter_slots(experts))
held = sum(t.numel() * t.itemsize for layer in layers for t in (layer.w13, layer.w2))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, held)
"""


def test_peak_memory_is_the_slots_and_at_most_a_quarter_more(tmp_path: Path) -> None:
    changes = {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 64, "num_hidden_layers": 1}
    config = small_config("deepseek_v3", first_k_dense_replace=0, **changes)
    path = small_checkpoint(tmp_path, "deepseek_v3", config)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_PEAK, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    peak, held = map(int, done.stdout.split())
    assert held == 32 * 3 * 512 * 512 * 2
    assert peak <= 1.25 * held


def test_only_the_files_of_the_experts_are_opened(deepseek: Path) -> None:
    for number in (1, 3):
        (deepseek / f"model-0000{number}-of-00003.safetensors").write_bytes(b"")
    checkpoint = Checkpoint(deepseek)
    checkpoint.check()
    assert len(list(checkpoint.iter_slots(np.array([[0, 1]], dtype=np.int32)))) == 1

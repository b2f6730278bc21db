"""Weights that are made: the same bits from any device, in any pieces; the published names, shapes and formats."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ep.checkpoint import Checkpoint, write_dequantized
from ep.errors import CheckpointError, OptionError
from ep.kernels.reference import Experts, experts_forward
from ep.made_slice import cached_slice, slice_config, write_made
from ep.made_tensors import MARKER_FILE
from ep.made_values import NORMAL, fill, make_key
from ep.placement import EMPTY
from ep.presets import list_presets, load_preset
from ep.target import resolve_target
from ep.terminal import Terminal
from tests.cases import small_checkpoint, small_config

FAMILIES = ("deepseek_v3", "mixtral")
DTYPES = {torch.float8_e4m3fn: np.uint8, torch.bfloat16: np.uint16, torch.float32: np.uint32}
INT32 = st.integers(-(2**31), 2**31 - 1)


def hashed(count: int, key: tuple[int, int]) -> np.ndarray:
    """uint8 [count]: the same rule in unsigned arithmetic."""
    with np.errstate(over="ignore"):
        words = np.arange(-(-count // 4), dtype=np.uint32) ^ np.uint32(key[0] % 2**32)
        words = (words ^ (words >> 16)) * np.uint32(0x7FEB352D) ^ np.uint32(key[1] % 2**32)
        words = (words ^ (words >> 15)) * np.uint32(0x846CA68B)
        words ^= words >> 16
    return words.astype("<u4").view(np.uint8)[:count]


@given(
    dtype=st.sampled_from(list(DTYPES)),
    count=st.integers(1, 3000),
    key=st.tuples(INT32, INT32),
    chunk=st.integers(1, 800).map(lambda n: 4 * n),
)
def test_values_are_the_rules_in_chunks_of_any_size(
    dtype: torch.dtype, count: int, key: tuple[int, int], chunk: int
) -> None:
    table = torch.tensor(NORMAL).to(dtype)
    raw = table.view(torch.uint8).numpy().view(DTYPES[dtype])
    for at_once in (chunk, None):
        out = torch.empty(count, dtype=dtype)
        fill(out, table, key, at_once)
        assert np.array_equal(out.view(torch.uint8).numpy().view(DTYPES[dtype]), raw[hashed(count, key)])


def test_bytes_are_even_and_tensors_unlike() -> None:
    count = 1 << 20
    table = torch.arange(256, dtype=torch.float32)
    found = []
    for seed, name in ((0, "a"), (0, "b"), (1, "a")):
        out = torch.empty(count)
        fill(out, table, make_key(seed, name))
        found.append(out)
        frequencies = torch.bincount(out.int(), minlength=256).double()
        chi2 = ((frequencies - count / 256) ** 2 / (count / 256)).sum()
        assert 150 < chi2 < 400  # 255 +- 23
    bound = 5 / math.sqrt(count)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(torch.corrcoef(torch.stack([found[a], found[b]]))[0, 1]) < bound
    for lag in (1, 2, 3, 4, 64, 4096):
        assert abs(torch.corrcoef(torch.stack([found[0][lag:], found[0][:-lag]]))[0, 1]) < bound


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        write_made(small_config(family), folder, seed=0)
    return folders


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def test_bits_never_change(folders: dict[str, Path]) -> None:
    """Pinned: on every machine and with every version of every library."""
    deepseek, mixtral = (Checkpoint(folders[family]) for family in FAMILIES)
    up = "model.layers.1.mlp.experts.5.up_proj.weight"
    assert digest(deepseek.read_tensor(up)) == "14e9b08f7d356a2c"
    assert digest(deepseek.read_tensor(f"{up}_scale_inv")) == "916216a5a4dae812"
    assert digest(deepseek.read_tensor("model.layers.1.mlp.gate.e_score_correction_bias")) == "964c68af94b1ca35"
    assert digest(mixtral.read_tensor("lm_head.weight")) == "285add5d35587221"


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_formats_are_those_of_a_written_checkpoint(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    made, written = Checkpoint(folders[family]), Checkpoint(small_checkpoint(tmp_path, family))
    made.check()
    assert made.is_made and not written.is_made
    assert sorted(made.tensor_names()) == sorted(written.tensor_names())
    for name in made.tensor_names():
        ours, theirs = made.read_tensor(name), written.read_tensor(name)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        assert ours.float().isfinite().all()


@pytest.mark.parametrize("preset_name", list_presets())
def test_shapes_are_the_published_ones(preset_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside transformers' model of the same config.json, which joins a layer's experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    preset = load_preset(preset_name)
    num_layers = preset.spec.moe_layers[0] + 2
    checkpoint = Checkpoint(cached_slice(preset, num_layers))
    checkpoint.check()
    spec = checkpoint.spec
    assert spec.num_layers == num_layers and spec.num_nextn_layers == 0
    assert (spec.hidden_size, spec.num_experts, spec.vocab_size) == (
        preset.spec.hidden_size,
        preset.spec.num_experts,
        preset.spec.vocab_size,
    )
    config = {**slice_config(preset, num_layers), "quantization_config": None}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    joined = {"gate_up": 0, "down": 0}
    for name in checkpoint.tensor_names():
        shape = checkpoint._entry(name).shape
        if name.endswith("_scale_inv"):
            of = checkpoint._entry(name.removesuffix("_scale_inv"))
            assert of.dtype == "F8_E4M3" and shape == tuple(-(-size // 128) for size in of.shape)
        elif ".experts." in name:
            joined["down" if name.split(".")[-2] in ("down_proj", "w2") else "gate_up"] += math.prod(shape)
        else:
            found[name.replace("block_sparse_moe", "mlp")] = shape
    for kind, total in joined.items():
        shapes = [wanted.pop(name) for name in list(wanted) if name.endswith(f"experts.{kind}_proj")]
        assert len(shapes) == spec.num_moe_layers and total == sum(map(math.prod, shapes))
    assert found == wanted


@pytest.mark.parametrize("keep_quantized", [False, True])
def test_slots_hold_the_whole_tensors_in_any_pieces(folders: dict[str, Path], keep_quantized: bool) -> None:
    checkpoint = Checkpoint(folders["deepseek_v3"])
    slots = np.array([[5, EMPTY, 0, 9, 5]], dtype=np.int32)
    (whole,) = checkpoint.iter_slots(slots, keep_quantized=keep_quantized)
    for at_once in (1, 2, 5, 9):
        pieces = list(checkpoint.iter_slots(slots, keep_quantized=keep_quantized, at_once=at_once))
        assert [piece.num_slots for piece in pieces] == [min(at_once, 5 - start) for start in range(0, 5, at_once)]
        for part in ("w13", "w2", "w13_scale", "w2_scale"):
            together = [getattr(piece, part) for piece in pieces]
            assert (together[0] is None) == (not keep_quantized and "scale" in part)
            assert together[0] is None or torch.equal(raw(torch.cat(together)), raw(getattr(whole, part)))
    for slot, expert_idx in enumerate(slots[0]):
        if expert_idx == EMPTY:
            assert not raw(whole.w13[slot]).any() and not raw(whole.w2[slot]).any()
            continue
        gate, up, down = (
            checkpoint.read_tensor(matrix.name) if keep_quantized else checkpoint.read_dequantized(matrix.name)
            for matrix in checkpoint.spec.expert_tensors(1, int(expert_idx))
        )
        assert torch.equal(raw(whole.w13[slot]), raw(torch.cat([gate, up])))
        assert torch.equal(raw(whole.w2[slot]), raw(down))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_an_expert_of_true_shape_uses_the_fp8_range_and_keeps_the_stream_in_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = Checkpoint(cached_slice(load_preset("deepseek-v3"), 4))
    slot = checkpoint.allocate_slots(1, keep_quantized=True)
    checkpoint.read_slots(3, [255], slot)
    assert slot.w13_scale is not None and slot.w13_scale.shape == (1, 32, 56)
    for codes, scales in ((slot.w13, slot.w13_scale), (slot.w2, slot.w2_scale)):
        assert codes.float().abs().max() == 448 and len(codes.float().unique()) > 64
        assert scales is not None and 3e-5 < scales.min() < scales.max() < 1e-3
        assert len(scales.unique()) > 200
    x = torch.randn(16, 7168, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids, weights = torch.zeros(16, 1, dtype=torch.int64), torch.full((16, 1), 1 / math.sqrt(8))
    expert = checkpoint.read_expert(3, 255)
    out = experts_forward(x, ids, weights, Experts(expert.w13, expert.w2)).float()
    assert out.std() * checkpoint.spec.routed_scaling_factor == pytest.approx(0.5, rel=0.1)  # 1 / sqrt(4 layers)


def test_text_of_a_model_with_made_weights_is_varied(folders: dict[str, Path], tmp_path: Path) -> None:
    """In transformers, from a copy that is written out: no name is missing or unknown there."""
    from transformers import AutoModelForCausalLM

    write_dequantized(folders["deepseek_v3"], tmp_path)
    assert not (tmp_path / MARKER_FILE).exists()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    torch.manual_seed(0)
    prompts = torch.randint(16, 256, (8, 12))
    with torch.no_grad():
        states = model(prompts, output_hidden_states=True).hidden_states
        text = model.generate(prompts, max_new_tokens=32, do_sample=False, pad_token_id=0)[:, 12:]
    assert all(0.5 < state.float().pow(2).mean().sqrt() < 3 for state in states)
    assert len({tuple(row.tolist()) for row in text}) == 8
    assert (text[:, 1:] == text[:, :-1]).float().mean() < 0.2


def test_large_vocabularies_have_a_token_for_every_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cached_slice(load_preset("deepseek-v3"), 4)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 129280
    ids = list(range(120000, 120050))
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False).ids == ids


def test_a_seed_and_a_number_of_layers_make_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    preset = load_preset("mixtral-8x7b")
    folders = [cached_slice(preset, 1), cached_slice(preset, 2), cached_slice(preset, 1, seed=1)]
    assert cached_slice(preset, 1) == folders[0] and len(set(folders)) == 3
    name = "model.layers.0.block_sparse_moe.gate.weight"
    gates = [Checkpoint(folder).read_tensor(name) for folder in folders]
    assert torch.equal(gates[0], gates[1]) and not torch.equal(gates[0], gates[2])
    assert sum(file.stat().st_size for file in folders[0].iterdir()) < 4e6


@pytest.mark.parametrize(
    ("name", "num_layers", "message"),
    [
        ("deepseek-v3", 3, "--layers 3: deepseek-v3 has 61 layers, 3 of them dense: expected 4 to 61"),
        ("deepseek-v3", 62, "--layers 62: deepseek-v3 has 61 layers, 3 of them dense: expected 4 to 61"),
        ("mixtral-8x7b", 33, "--layers 33: mixtral-8x7b has 32 layers: expected 1 to 32"),
    ],
)
def test_layers_that_cannot_be_are_refused(name: str, num_layers: int, message: str) -> None:
    with pytest.raises(OptionError) as error:
        resolve_target(name, None, True, Terminal(), num_layers)
    assert str(error.value) == message


def test_layers_go_with_synthetic_alone(folders: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match="--layers 5: goes with --synthetic"):
        resolve_target("deepseek-v3", None, False, Terminal(), 5)
    folder = str(folders["mixtral"])
    with pytest.raises(OptionError, match=f"--layers 1: {folder} has its own layers"):
        resolve_target("mixtral-8x7b", folder, False, Terminal(), 1)
    assert resolve_target("mixtral-8x7b", folder, False, Terminal()).made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no seed and rule can be read: JSONDecodeError"),
        ("[]", "no seed and rule can be read: TypeError"),
        ('{"seed": 1}', "no seed and rule can be read: KeyError"),
        ('{"seed": 1, "rule": 99}', "rule is 99, seed 1, expected rule 1 and an integer"),
    ],
)
def test_bad_markers_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small_config("mixtral")))
    (tmp_path / MARKER_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=f"{MARKER_FILE}: {message}"):
        Checkpoint(tmp_path)

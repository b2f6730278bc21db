"""Model specs and presets: true dims, derived sizes, and one clear line for every config that cannot be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ep.errors import ModelError
from ep.model import ModelSpec
from ep.presets import list_presets, load_preset, parse_preset
from tests.cases import small_config

PRESETS = Path(__file__).parents[2] / "configs" / "models"


def test_presets_are_the_files() -> None:
    assert list_presets() == sorted(file.stem for file in PRESETS.glob("*.toml"))
    assert {"deepseek-v3", "mixtral-8x7b", "mixtral-8x22b"} <= set(list_presets())


def test_deepseek_v3_has_its_published_dims() -> None:
    spec = load_preset("deepseek-v3").spec
    assert (spec.hidden_size, spec.moe_intermediate_size, spec.num_experts, spec.top_k) == (7168, 2048, 256, 8)
    assert (spec.num_groups, spec.topk_groups, spec.quant_block) == (8, 4, (128, 128))
    assert spec.moe_layers == tuple(range(3, 61))
    assert (spec.routed_scaling_factor, spec.norm_topk_prob, spec.scoring) == (2.5, True, "sigmoid")
    assert spec.max_position_embeddings == 163840
    gate, up, down = spec.expert_tensors(3, 255)
    assert gate.name == "model.layers.3.mlp.experts.255.gate_proj.weight"
    assert (gate.shape, gate.scale_shape) == ((2048, 7168), (16, 56))
    assert (up.name, up.shape) == ("model.layers.3.mlp.experts.255.up_proj.weight", gate.shape)
    assert (down.shape, down.scale_shape) == ((7168, 2048), (56, 16))
    assert down.scale_name == "model.layers.3.mlp.experts.255.down_proj.weight_scale_inv"
    # 671 billion parameters, all but about 17 billion of them in routed experts (DeepSeek-V3 report, section 4.2).
    routed = spec.num_moe_layers * spec.num_experts * spec.expert_params
    assert 653e9 < routed < 656e9


@pytest.mark.parametrize(
    ("name", "num_params", "max_positions"), [("mixtral-8x7b", 46.7e9, 32768), ("mixtral-8x22b", 140.6e9, 65536)]
)
def test_mixtral_has_its_published_size(name: str, num_params: float, max_positions: int) -> None:
    spec = load_preset(name).spec
    attention = 2 * spec.hidden_size * spec.head_dim * (spec.num_heads + spec.num_kv_heads)
    gate = spec.num_experts * spec.hidden_size
    experts = spec.num_experts * spec.expert_params
    total = spec.num_layers * (attention + gate + experts) + 2 * spec.vocab_size * spec.hidden_size
    assert total == pytest.approx(num_params, rel=0.002)
    assert spec.max_position_embeddings == max_positions
    assert spec.expert_bytes == 2 * spec.expert_params
    assert [t.name.split(".")[-2] for t in spec.expert_tensors(0, 7)] == ["w1", "w3", "w2"]


@pytest.mark.parametrize("name", list_presets())
def test_stand_in_keeps_the_architecture(name: str) -> None:
    preset = load_preset(name)
    true, small = preset.spec, preset.synthetic_spec
    for field in ("family", "num_experts", "top_k", "num_groups", "topk_groups", "scoring", "quant_block"):
        assert getattr(small, field) == getattr(true, field), field
    assert small.num_shared_experts == true.num_shared_experts
    assert small.routed_scaling_factor == true.routed_scaling_factor
    assert small.max_position_embeddings >= 4096
    assert preset.synthetic_config.keys() == preset.config.keys()


def test_layer_positions() -> None:
    spec = ModelSpec.from_config(small_config("deepseek_v3", num_hidden_layers=6, moe_layer_freq=2), "here")
    assert spec.moe_layers == (2, 4)
    assert [spec.layer_pos(layer_idx) for layer_idx in spec.moe_layers] == [0, 1]


def test_expert_bytes_count_scales() -> None:
    spec = ModelSpec.from_config(small_config("deepseek_v3"), "here")
    matrices = spec.expert_tensors(1, 0)
    assert (matrices.gate.scale_shape, matrices.down.scale_shape) == ((1, 2), (2, 1))
    assert spec.expert_bytes == 3 * 192 * 128 + 4 * 6


DEEPSEEK_MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    ({"n_routed_experts": 18}, ["n_routed_experts", "18", "n_group 4"]),
    ({"n_routed_experts": 4}, ["n_routed_experts", "4", "n_group"]),
    ({"topk_group": 5}, ["topk_group", "5", "4"]),
    ({"num_experts_per_tok": 9}, ["num_experts_per_tok", "9", "8 experts"]),
    ({"first_k_dense_replace": None}, ["first_k_dense_replace", "None", "int"]),
    ({"first_k_dense_replace": 2}, ["num_hidden_layers", "2"]),
    ({"moe_layer_freq": 0}, ["moe_layer_freq", "0"]),
    ({"hidden_size": "big"}, ["hidden_size", "'big'", "int"]),
    ({"hidden_size": True}, ["hidden_size", "True", "int"]),
    ({"norm_topk_prob": 1}, ["norm_topk_prob", "1", "bool"]),
    ({"scoring_func": "softmax"}, ["scoring_func", "softmax", "sigmoid"]),
    ({"topk_method": "greedy"}, ["topk_method", "greedy", "noaux_tc"]),
    ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
    ({"quantization_config": {"quant_method": "awq"}}, ["quant_method", "awq", "fp8"]),
    ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, ["fmt", "e5m2", "e4m3"]),
    ({"quantization_config": {"quant_method": "fp8"}}, ["weight_block_size", "missing"]),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0]}}, ["weight_block_size", "0"]),
    ({"architectures": ["LlamaForCausalLM"]}, ["architectures", "LlamaForCausalLM", "MixtralForCausalLM"]),
]


@pytest.mark.parametrize(("changes", "words"), DEEPSEEK_MISTAKES, ids=lambda value: str(value)[:40])
def test_unsupported_config_is_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        ModelSpec.from_config(small_config("deepseek_v3", **changes), "/models/x/config.json")
    message = str(caught.value)
    assert message.startswith("/models/x/config.json: ") and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("key", ["num_local_experts", "intermediate_size", "num_experts_per_tok", "vocab_size"])
def test_missing_key_is_named(key: str) -> None:
    config = small_config("mixtral")
    del config[key]
    with pytest.raises(ModelError, match=f"^here: {key} is missing$"):
        ModelSpec.from_config(config, "here")


def test_from_path(tmp_path: Path) -> None:
    config = small_config("mixtral")
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = ModelSpec.from_path(tmp_path)
    assert spec == ModelSpec.from_config(config, "elsewhere")
    assert spec.source == str(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: not JSON"):
        ModelSpec.from_path(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="list, expected an object"):
        ModelSpec.from_path(tmp_path)
    with pytest.raises(ModelError, match=r"nowhere.config\.json: no such file"):
        ModelSpec.from_path(tmp_path / "nowhere")


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ModelError) as caught:
        load_preset("deepseek-v4")
    assert all(name in str(caught.value) for name in ["deepseek-v4", *list_presets()])


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ('repo = "', 'home = "x"\nrepo = "', "home"),
        ("[config]\n", "[config]\nmoe_layer_frequency = 1\n", "moe_layer_frequency"),
        ("[synthetic]\n", "[synthetic]\ntemperature = 1\n", "temperature"),
        ("[synthetic.config]\n", "[synthetic.config]\nnum_layers = 1\n", "num_layers"),
        ("[synthetic.config.rope_scaling]\n", "[synthetic.config.rope_scaling]\nfaktor = 1\n", "faktor"),
        ("seed = 0", 'seed = "zero"', "seed is 'zero', expected int"),
        ("seed = 0", "seed = ", "TOML|Invalid|value"),
    ],
)
def test_preset_with_a_wrong_key_is_refused(old: str, new: str, word: str) -> None:
    text = (PRESETS / "deepseek-v3.toml").read_text()
    assert parse_preset("x", text, "x.toml").spec.num_layers == 61
    assert old in text
    with pytest.raises(ModelError, match=word):
        parse_preset("x", text.replace(old, new), "x.toml")

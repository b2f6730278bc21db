"""`ep explain` as a user runs it: both of the project's own questions with their figures, options, mistakes, files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ep import cli
from ep.errors import ModelError
from ep.explain.figure import KINDS, Figure
from ep.explain.hardware import FIGURES, list_hardware, load_hardware, parse_hardware
from tests.cases import small_checkpoint

DEVICES = Path(__file__).parents[2] / "configs" / "devices"
MIXTRAL = ("mixtral-8x22b", "--input-len", "8192", "--output-len", "3", "--batch-size", "32", "--device", "mi300x")
DEEPSEEK = ("deepseek-v3", "--device", "mi300x", "--nodes", "2", "--shards", "16")


def explain(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(cli.cli, ["explain", *arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def text(*arguments: str, columns: int = 80) -> str:
    done = CliRunner().invoke(cli.cli, ["explain", *arguments], env={"COLUMNS": str(columns)}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a user's mistake."""
    monkeypatch.setattr(sys, "argv", ["ep", "explain", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1, printed
    return printed.err


def test_the_decision_list_of_mixtral_8x22b() -> None:
    """8192 in, 3 out, batch 32: prefill of 8192 x 8 tokens is not captured, decode from 8193 on is."""
    older = explain(*MIXTRAL)["older"]
    assert older["capture_sizes"] == [1, 2, 4, *range(8, 257, 8)]
    assert older["max_captured_len"] == 8195
    prefill, decode = older["steps"]
    assert (prefill["detail"], prefill["count"], prefill["captured"]) == ("8,192 x 8 tokens", 4, False)
    assert prefill["tokens"] == [65536, 65536] and "not decode only" in prefill["why"]
    assert (decode["positions"], decode["count"], decode["captured"]) == ([8193, 8194], 2, True)
    assert (decode["tokens"], decode["padded"]) == ([32, 32], 32)
    assert [condition.split(":")[0] for condition in older["conditions"]] == [
        "decode only",
        "enforce_eager off",
        "batch within the captured sizes",
        "sequence within the captured length",
    ]
    assert older["notes"] == [
        "--max-seq-len-to-capture left at its default of 8,192: decode runs eager beyond 8,192"
    ]


def test_both_engines_say_whether_prefill_is_chunked() -> None:
    found = explain(*MIXTRAL)
    assert found["older"]["chunked_prefill"]["by_length"] is True
    assert "65,536 > 32,768" in found["older"]["chunked_prefill"]["why"]
    current = found["current"]
    assert current["chunked_prefill"]["enabled"] and current["chunked_prefill"]["budget"] == 16384
    assert [(step["phase"], step["graph"]) for step in current["steps"]] == [
        ("prefill", "eager"),
        ("mixed", "eager"),
        ("mixed", "piecewise"),
        ("decode", "full"),
        ("decode", "full"),
    ]
    (note,) = current["notes"]
    assert "--transport socket" in note and "piecewise in place of full" in note
    apart = ("--device", "h200", "--shards", "4")
    cuda = explain("mixtral-8x22b", *apart, "--input-len", "8192", "--output-len", "3")["older"]
    assert cuda["chunked_prefill"]["enabled"] and cuda["chunked_prefill"]["budget"] == 2048
    assert cuda["steps"][0]["count"] == 8192 * 32 // 2048 and not cuda["steps"][0]["captured"]
    assert any("8,192 x 8 tokens" in note for note in cuda["notes"])
    short = explain("mixtral-8x7b", "--device", "h200")["older"]["chunked_prefill"]
    assert (short["by_length"], short["enabled"]) == (False, False) and "32,768 <= 32,768" in short["why"]


def test_the_shapes_and_sizes_of_deepseek_v3() -> None:
    found = explain(*DEEPSEEK)
    assert found["expert_matrices"] == [
        {"name": "gate", "shape": [2048, 7168], "scale_shape": [16, 56]},
        {"name": "up", "shape": [2048, 7168], "scale_shape": [16, 56]},
        {"name": "down", "shape": [7168, 2048], "scale_shape": [56, 16]},
    ]
    sizes = found["sizes"]
    assert sizes["params"] == sum(part["params"] for part in found["parts"] if part["holder"] != "nobody")
    assert sizes["params"] == pytest.approx(671e9, rel=0.001) and abs(sizes["off_published"]) < 0.001
    assert sizes["params_with_next_token"] == pytest.approx(685e9, rel=0.001)
    assert sizes["active_without_embedding"] == pytest.approx(37e9, rel=0.011)
    # 3 x 2048 x 7168 FP8 values and 3 x 16 x 56 float32 scales; 256 experts; 17 slots of one shard in 58 layers.
    assert sizes["expert_bytes"] == 44_040_192 + 10_752 == found["shard"]["slot_bytes"]
    assert sizes["expert_layer_bytes"] == 256 * 44_050_944
    assert found["shard"]["slots"] == 58 * 17 * 44_050_944
    assert found["kv"]["bytes_per_token"] == 61 * (512 + 64) * 2
    assert found["context"]["tokens"] == 163840
    assert "max_position_embeddings" in found["context"]["why"] and "yarn" in found["context"]["why"]
    layout = found["layout"]
    assert (layout["gpus"], layout["gpus_needed"], layout["beside_router"]) == (16, 17, 1)
    assert "15 shards or 3 nodes" in layout["why"]
    router = found["router"]
    assert router["shards"] == found["shard"]["total"]
    assert router["fits"] and "--gpu-memory-utilization 0.69" in router["why"]
    assert router["requests_left"] == router["requests"] - 32


def test_every_expected_time_says_where_it_comes_from() -> None:
    found = explain(*DEEPSEEK)
    figures: list[dict[str, Any]] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            if value.keys() == {"value", "kind", "source"}:
                figures.append(value)
            for inner in value.values():
                collect(inner)
        elif isinstance(value, list):
            for inner in value:
                collect(inner)

    collect(found)
    assert len(figures) > 20
    assert all(figure["kind"] in KINDS and figure["source"] and figure["value"] > 0 for figure in figures)
    trip, decode = found["round_trip"], found["decode"]
    assert trip["total"]["value"] == pytest.approx(trip["transfer"]["value"] + trip["experts"]["value"])
    us = {part["name"]: part["us"]["value"] for part in decode["parts"]}
    layer = us["attention"] + us["gate"] + max(trip["total"]["value"], us["shared expert"])
    step = 58 * layer + 3 * (us["attention"] + us["dense MLP"]) + us["head"]
    assert decode["moe_layer_us"]["value"] == pytest.approx(layer)
    assert decode["step_us"]["value"] == pytest.approx(step)
    assert decode["tokens_per_s"] == pytest.approx(32e6 / step)


def test_a_known_round_trip_is_repeated_as_it_is_known() -> None:
    """MoRI's EP8 measurement on MI300X, asked for in its own sizes, comes back as published; others are estimates."""
    asked = ("deepseek-v3", "--device", "mi300x", "--shards", "8", "--batch-size", "128")
    same = explain(*asked, "--dispatch-dtype", "fp8")["round_trip"]["transfer"]
    assert (same["value"], same["kind"]) == (82.0, "published")
    other = explain(*asked, "--dispatch-dtype", "bf16")["round_trip"]["transfer"]
    assert other["kind"] == "estimated" and other["value"] > same["value"]
    pair = explain("deepseek-v3", "--device", "h200", "--shards", "1", "--batch-size", "128", "--dispatch-dtype", "fp8")
    assert (pair["round_trip"]["transfer"]["value"], pair["round_trip"]["transfer"]["kind"]) == (25.8, "measured")


def test_shards_that_do_not_fit_say_how_many_would() -> None:
    """DeepSeek-V3's experts are 654 GB; a quarter of them, with the spare slots, is more than an H200's 151 GB."""
    found = explain("deepseek-v3", "--device", "h200", "--shards", "4")
    assert not found["shard"]["fits"] and found["fewest_shards"] == 5
    assert explain("deepseek-v3", "--device", "h200", "--shards", "5")["shard"]["fits"]
    assert "does not fit: 5 shards would" in " ".join(text("deepseek-v3", "--device", "h200", "--shards", "4").split())


def test_tuned_files_under_every_name() -> None:
    """MI300X and MI308X share names; the PCI id tells them apart, else the compute units do."""
    tuned = {group["device"]: group["files"] for group in explain(*DEEPSEEK)["tuned"]}
    assert list(tuned) == ["mi300x", "mi308x"]
    for device, names in (
        ("mi300x", {"AMD_Instinct_MI300X", "AMD_Instinct_MI300X_OAM", "AMD_Radeon_Graphics"}),
        (
            "mi308x",
            {"AMD_Instinct_MI308X", "AMD_Instinct_MI308X_OAM", "AMD_Instinct_MI300X_OAM", "AMD_Radeon_Graphics"},
        ),
    ):
        rows = [row for row in tuned[device] if row["resolved"] == f"AMD_Instinct_{device.upper()}"]
        assert names <= {row["reported"] for row in rows}
        assert {None} < {row["pci_id"] for row in rows}
        wanted = f"E=18,N=2048,device_name=AMD_Instinct_{device.upper()},dtype=fp8_w8a8,block_shape=[128,128].json"
        assert {row["file"] for row in rows} == {wanted} and {row["folder"] for row in rows} == {"ep"}
        assert not any(row["vllm_found"] for row in rows)
    hidden = [row for row in tuned["mi308x"] if row["pci_id"] is None and row["reported"] == "AMD_Radeon_Graphics"]
    assert "device_name=AMD_Radeon_Graphics" in hidden[0]["vllm_file"]


@pytest.mark.parametrize("arguments", [MIXTRAL, DEEPSEEK])
@pytest.mark.parametrize("columns", [80, 132])
def test_the_page_fits_its_terminal(arguments: tuple[str, ...], columns: int) -> None:
    page = text(*arguments, columns=columns)
    assert max(map(len, page.splitlines())) <= columns
    assert "[e]" in page and "[p]" in page


def test_the_page_of_mixtral_8x22b() -> None:
    lines = [" ".join(line.split()) for line in text(*MIXTRAL, columns=132).splitlines()]
    assert "prefill 4 8,192 x 8 no prefill: not decode only" in lines
    assert "decode 2 32 -> 32 8,193..8,194 full length <= 8,195, batch <= 256" in lines
    assert "captured sizes: 1, 2, 4, 8, 16 .. 256 (every 8)" in lines
    assert "max_model_len 65,536: max_position_embeddings of the config" in lines


def test_the_page_of_deepseek_v3() -> None:
    lines = [" ".join(line.split()) for line in text(*DEEPSEEK, columns=132).splitlines()]
    for line in (
        "gate [2048, 7168] (16, 56)",
        "down [7168, 2048] (56, 16)",
        "of one expert 44.05 MB FP8 and float32 scales",
        "of a shard 43.43 GB 17 slots x 58 layers, 1 of them empty for moves",
        "routed experts 58 x 256 653.91 B 654.07 GB shards",
        "the model 671.03 B 673.15 GB",
    ):
        assert line in lines, line


@pytest.mark.parametrize(
    ("option", "value", "path"),
    [
        ("--device", "h200", ("router", "kv_tokens")),
        ("--input-len", "2048", ("older", "steps")),
        ("--output-len", "64", ("older", "steps")),
        ("--batch-size", "128", ("round_trip", "rows")),
        ("--shards", "8", ("layout", "slots_per_shard")),
        ("--nodes", "3", ("layout", "gpus")),
        ("--redundant", "32", ("layout", "slots_per_shard")),
        ("--spare-slots", "4", ("layout", "slots_per_shard")),
        ("--max-model-len", "4096", ("context", "tokens")),
        ("--kv-cache-dtype", "fp8", ("kv", "bytes_per_token")),
        ("--dispatch-dtype", "fp8", ("round_trip", "bytes_out")),
        ("--max-seq-len-to-capture", "1100", ("older", "max_captured_len")),
    ],
)
def test_every_option_changes_the_answer(option: str, value: str, path: tuple[str, str]) -> None:
    arguments = [word for name, word in zip(DEEPSEEK[1::2], DEEPSEEK[2::2]) if name != option for word in (name, word)]
    one = explain(*DEEPSEEK)
    other = explain("deepseek-v3", *arguments, option, value)
    assert one[path[0]][path[1]] != other[path[0]][path[1]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("deepseek-v3", "--device", "mi999"), ("--device mi999", "h200, mi300x, mi308x")),
        (("no-such-model",), ("no-such-model", "deepseek-v3")),
        (("mixtral-8x7b", "--input-len", "32768"), ("32896 tokens", "at most 32768", "max_position_embeddings")),
        (("mixtral-8x7b", "--max-model-len", "1000"), ("1152 tokens", "at most 1000", "--max-model-len")),
        (("mixtral-8x7b", "--max-model-len", "40000"), ("--max-model-len 40000", "32768")),
        (("mixtral-8x7b", "--shards", "9"), ("--shards 9", "8 experts")),
        (("mixtral-8x7b", "--shards", "2", "--redundant", "9"), ("num_redundant is 9", "at most 8")),
        (("mixtral-8x7b", "--batch-size", "0"), ("--batch-size",)),
        (("deepseek-v3", "--checkpoint", "/no/such/folder"), ("/no/such/folder/config.json",)),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...],
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refused(monkeypatch, capsys, *arguments)
    assert all(word in line for word in words), line


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("deepseek"), "deepseek_v3")


def test_a_checkpoint_is_compared_tensor_by_tensor(stand_in: Path) -> None:
    found = explain("deepseek-v3", "--checkpoint", str(stand_in), "--shards", "2")
    assert found["checked_checkpoint"] == str(stand_in)
    index = json.loads((stand_in / "model.safetensors.index.json").read_text())
    assert found["sizes"]["bytes"] == index["metadata"]["total_size"]
    assert found["sizes"]["published"]["params"] == 671e9  # the preset's, so that a stand-in shows how far off it is
    assert explain(str(stand_in), "--shards", "2")["sizes"]["published"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"moe_intermediate_size": 256}, ("shape [128, 192], expected [256, 192]",)),
        ({"num_hidden_layers": 3}, ("model.layers.2.", "is missing")),
        ({"num_hidden_layers": 2, "first_k_dense_replace": 0}, ("model.layers.0.mlp", "is missing")),
        ({"n_shared_experts": 0}, ("shared_experts", "none that its config asks for")),
    ],
)
def test_a_checkpoint_that_is_not_its_configs(
    change: dict[str, int],
    words: tuple[str, ...],
    stand_in: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stand_in, copy)
    config = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps(config))
    line = refused(monkeypatch, capsys, "deepseek-v3", "--checkpoint", str(copy), "--shards", "2")
    assert all(word in line for word in words), line


def test_devices_are_the_files_and_say_where_their_constants_come_from() -> None:
    assert list_hardware() == sorted(file.stem for file in DEVICES.glob("*.toml")) == ["h200", "mi300x", "mi308x"]
    for key in list_hardware():
        hardware = load_hardware(key)
        figures = [getattr(hardware, name) for name in FIGURES]
        figures += [figure for known in (hardware.same_node, hardware.between_nodes) for figure in vars(known).values()]
        found = [figure for figure in figures if isinstance(figure, Figure)]
        assert len(found) == 8 and all(figure.value > 0 and figure.source for figure in found)
        assert hardware.fp8_flops.value > hardware.bf16_flops.value > 1e13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('kind = "published"', 'kind = "guessed"'), "guessed"),
        (("gpus_per_node = 8", ""), "gpus_per_node is missing"),
        (("units = 304", "units = 304\ncolour = 1"), "colour"),
    ],
)
def test_a_wrong_device_file_is_refused_with_its_name(change: tuple[str, str], message: str) -> None:
    file = DEVICES / "mi300x.toml"
    with pytest.raises(ModelError, match=message) as error:
        parse_hardware("mi300x", file.read_text().replace(*change, 1), str(file))
    assert str(file) in str(error.value)


def test_measured_ceilings_are_those_of_the_kernels() -> None:
    from ep.explain.round_trip import ceilings
    from ep.kernels.roofline import MEASURED

    assert ceilings(load_hardware("h200")) == MEASURED["NVIDIA_H200"]

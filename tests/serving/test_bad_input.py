"""User mistakes: one line that names the path and the values, exit code 2, nothing left running."""

from __future__ import annotations

import json
import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from ep.checkpoint import INDEX_FILE
from ep.presets import load_preset
from ep.synthetic import cached_checkpoint
from tests.serving.served import free_port, run_ep


@pytest.fixture(scope="module")
def stand_in() -> Path:
    return cached_checkpoint(load_preset("deepseek-v3"))


def expect(arguments: list[str], *words: str) -> None:
    """`ep *arguments` says all the words in one line, and that is all it does."""
    mark = {"EP_TEST_RUN": uuid.uuid4().hex}
    result = run_ep(*arguments, environment=mark)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("ep: ")]
    assert "Traceback" not in result.stderr
    assert all(word in line for word in words), line
    assert result.returncode == 2, result.stderr
    left = [p for p in psutil.process_iter(["cmdline", "environ"]) if mark.items() <= (p.info["environ"] or {}).items()]
    assert not left


def broken(stand_in: Path, folder: Path, mend: Callable[[Path], None]) -> str:
    copy = folder / "checkpoint"
    shutil.copytree(stand_in, copy)
    mend(copy)
    return str(copy)


def test_unknown_model() -> None:
    expect(["serve", "deepseek-v9"], "deepseek-v9", "deepseek-v3", "mixtral-8x7b")


def test_unknown_option() -> None:
    expect(["serve", "deepseek-v3", "--shard", "two"], "--shard")


def test_a_trace_that_exists(tmp_path: Path) -> None:
    trace = tmp_path / "old.trace"
    trace.write_bytes(b"kept")
    expect(["serve", "deepseek-v3", "--trace", str(trace)], str(trace), "exists already")
    assert trace.read_bytes() == b"kept"
    expect(["serve", "deepseek-v3", "--trace", str(tmp_path / "none" / "x.trace")], str(tmp_path / "none"), "no folder")


def test_no_such_checkpoint() -> None:
    expect(["serve", "deepseek-v3", "--checkpoint", "/nowhere/at-all"], "/nowhere/at-all")


def test_missing_file(stand_in: Path, tmp_path: Path) -> None:
    path = broken(stand_in, tmp_path, lambda copy: (copy / "model-00003-of-00005.safetensors").unlink())
    expect(["serve", "deepseek-v3", "--checkpoint", path], path, "model-00003-of-00005.safetensors")


def test_truncated_file(stand_in: Path, tmp_path: Path) -> None:
    def cut(copy: Path) -> None:
        file = copy / "model-00003-of-00005.safetensors"
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size // 2)

    path = broken(stand_in, tmp_path, cut)
    expect(["serve", "deepseek-v3", "--checkpoint", path], "model-00003-of-00005.safetensors", "truncated")


@pytest.mark.parametrize("suffix", ["weight", "weight_scale_inv"])
def test_wrong_shape(stand_in: Path, tmp_path: Path, suffix: str) -> None:
    name = f"model.layers.2.mlp.experts.7.up_proj.{suffix}"

    def reshape(copy: Path) -> None:
        file = copy / json.loads((copy / INDEX_FILE).read_text())["weight_map"][name]
        kept = load_file(file)
        kept[name] = kept[name][:1].clone()
        if suffix == "weight_scale_inv":
            kept[name] = kept[name].repeat(3, 1)
        save_file(kept, file)

    path = broken(stand_in, tmp_path, reshape)
    expect(["serve", "deepseek-v3", "--checkpoint", path], name, "shape", "expected")


def test_more_shards_than_experts() -> None:
    expect(["serve", "mixtral-8x7b", "--synthetic", "--shards", "9"], "--shards 9", "8")


def test_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        expect(["serve", "deepseek-v3", "--synthetic", "--port", port], "--port", port, "in use")


def test_no_such_cluster() -> None:
    address = f"127.0.0.1:{free_port()}"
    expect(["serve", "deepseek-v3", "--synthetic", "--address", address, "--port", str(free_port())], address)


def test_a_vllm_flag_that_does_not_fit_the_model() -> None:
    arguments = ["serve", "deepseek-v3", "--synthetic", "--port", str(free_port()), "--", "--max-model-len", "99999999"]
    expect(arguments, "vLLM flags after `--`", "max_model_len", "99999999")


def test_unknown_vllm_flag() -> None:
    arguments = ["serve", "deepseek-v3", "--synthetic", "--port", str(free_port()), "--", "--no-such-flag"]
    expect(arguments, "--no-such-flag", "vLLM")


def test_vllm_flag_that_ep_sets() -> None:
    arguments = ["serve", "deepseek-v3", "--synthetic", "--port", str(free_port()), "--", "--load-format", "dummy"]
    expect(arguments, "--load-format")


def test_status_without_a_cluster() -> None:
    address = f"127.0.0.1:{free_port()}"
    expect(["status", "--address", address], address)


def test_more_replicas_than_shards_can_hold() -> None:
    expect(["serve", "deepseek-v3", "--redundant", "100000"], "100000")

"""`ep tune` and `ep bench kernels` where there is nothing to measure: one line and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ep import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ep", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("tune", "deepseek-v3", "--shards", "8", "--shards", "16", "--tokens", "8"),
            "ep: ep tune: this machine has no",
        ),
        (("bench", "kernels", "--slots", "4", "--tokens", "8", "--no-baselines"), "ep: ep bench kernels: this machine"),
    ],
)
def test_without_a_gpu_one_line_says_so(
    arguments: tuple[str, ...],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(line) and printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("tune", "no-such-model"), ("bench", "kernels", "--model", "no-such-model")])
def test_an_unknown_model_is_named(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert "no-such-model" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("tune", "deepseek-v3", "--tokens", "0"), ("bench", "kernels", "--slots", "0")])
def test_sizes_begin_at_one(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, *arguments) == 2

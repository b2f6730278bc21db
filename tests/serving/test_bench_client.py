"""vLLM's client in a process of its own, and how it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from ep.bench.client import Client, Load
from ep.errors import EpError


def test_what_goes_wrong_names_the_log_and_ends_with_the_context(tmp_path: Path) -> None:
    load = Load(2, 8, 4, 4, 0)
    with Client(tmp_path) as client:
        for name in ("first", "second"):  # the process stays
            with pytest.raises(EpError, match=rf"client-{name}\.log: vLLM's benchmark client: .*Error"):
                client.run(load, "http://127.0.0.1:1", "model", str(tmp_path / "no-tokenizer"), name)
            assert "Traceback" in (tmp_path / f"client-{name}.log").read_text()
        client._process.kill()
        with pytest.raises(EpError, match=r"client-third\.log: .* ended with exit code -9"):
            client.run(load, "http://127.0.0.1:1", "model", "tokenizer", "third")
    assert client._process.poll() is not None

"""How a benchmark ends: one line of JSON on the terminal, the same, indented, in a file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any


def print_json(bench: str, result: Any, output: str | None) -> None:
    """result: a dataclass. output: a file's path, None for no file."""
    found = {"bench": bench, **asdict(result)}
    if output:
        Path(output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found), flush=True)

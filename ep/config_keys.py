"""Typed reads from a Hugging Face config.json or a preset: every error names the file, the key and the value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ep.errors import ModelError

T = TypeVar("T")


def read_config(path: str | Path) -> dict[str, Any]:
    """The config.json in the directory `path` (or the file `path`). Raises ModelError."""
    path = Path(path)
    file = path if path.is_file() else path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file}: no such file, expected a Hugging Face config.json") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: {error}") from error
    except json.JSONDecodeError as error:
        raise ModelError(f"{file}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: holds a JSON {type(config).__name__}, expected an object")
    return config


class ConfigKeys:
    """Typed reads from a table; `source` names it in errors. Every method raises ModelError."""

    def __init__(self, table: Mapping[str, Any], source: str) -> None:
        self.table = table
        self.source = source

    def get(self, key: str, kind: type[T]) -> T:
        if key not in self.table:
            raise ModelError(f"{self.source}: {key} is missing")
        value = self.table[key]
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelError(f"{self.source}: {key} is {value!r}, expected {kind.__name__}")
        return value

    def size(self, key: str, minimum: int = 1) -> int:
        value = self.get(key, int)
        if value < minimum:
            raise ModelError(f"{self.source}: {key} is {value}, expected at least {minimum}")
        return value

    def optional_size(self, key: str) -> int | None:
        return None if self.table.get(key) is None else self.size(key)

    def expect(self, key: str, expected: object, default: object) -> None:
        value = self.table.get(key, default)
        if value != expected:
            raise ModelError(f"{self.source}: {key} is {value!r}, expected {expected!r}")

    def only(self, *known: str) -> None:
        unknown = sorted(self.table.keys() - set(known))
        if unknown:
            raise ModelError(f"{self.source}: {unknown[0]} is no known key, expected one of {', '.join(known)}")

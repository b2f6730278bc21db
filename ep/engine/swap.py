"""Build a vLLM model with one of its module-level classes replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def swapped(module: ModuleType, name: str, replacement: type) -> Iterator[None]:
    """`module.name` is `replacement` inside the block: vLLM's decoder layers look their MoE class up in their module."""
    original = getattr(module, name)
    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, original)

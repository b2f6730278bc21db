"""Replace one module-level name of vLLM for as long as a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def swapped(module: ModuleType, name: str, replacement: object) -> Iterator[None]:
    """`module.name` is `replacement` inside the block: vLLM looks such names up when it needs them."""
    original = getattr(module, name)
    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, original)

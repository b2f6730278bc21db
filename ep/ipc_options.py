"""What `ep serve` tells routers and shards of their ipc: plain values, for processes that never touch a tensor too."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class IpcOptions:
    """block: name of the mailboxes. num_routers: places in them. dispatch_dtype, combine_dtype: how rows and partials
    travel (bf16 or fp8; bf16 or f32)."""

    block: str
    num_routers: int
    dispatch_dtype: str
    combine_dtype: str


def block_name(instance: str) -> str:
    """The mailboxes of an instance, whose name may have anything in it but ends in what makes it the only one."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", instance)[-100:]

"""What routers and shards of the ipc transport hand each other when they meet, and what a router says it carried.

Shape legend: S shards, L MoE layers, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ep.kernels.p2p_layout import MessageShape
from ep.transport.ipc_device import TensorHandle


@dataclass(frozen=True, eq=False)
class Carried:
    """What went out since the last time. pairs: int64 [2, L, E], of each logical expert, prefill and decode. rows,
    messages: int64 [S], to each shard."""

    pairs: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    messages: npt.NDArray[np.int64]


@dataclass(frozen=True)
class RouterHandles:
    """What a shard needs to serve a router. Pickles. box: where partials and flags go (MessageShape.return_bytes)."""

    router_idx: int
    message: MessageShape
    num_shards: int
    box: TensorHandle


@dataclass(frozen=True)
class ShardHandles:
    """What a router needs to reach a shard. Pickles. inbox: where its messages go (MessageShape.inbox_bytes). pid: of
    the shard's process."""

    shard_idx: int
    pid: int
    inbox: TensorHandle

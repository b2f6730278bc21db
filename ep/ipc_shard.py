"""A shard's slots for the routers of its node: the ipc server beside the shard's sockets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ep.ipc_options import IpcOptions
from ep.ipc_server import IpcServer
from ep.ipc_setup import limits, message_shape, open_device, whole_rows
from ep.shard import Shard
from ep.transport.ipc_handles import RouterHandles, ShardHandles
from ep.transport.mailbox import MailboxBlock


class IpcShard:
    """Serves from when it is made, on a thread and, on a GPU, a stream of its own. on_failure: called when that thread
    has ended by an error; is_hosted: in a router's process. Raises OptionError for what the kernels do not support,
    TransportError for mailboxes of other dimensions."""

    def __init__(
        self,
        shard: Shard,
        options: IpcOptions,
        device: torch.device,
        on_failure: Callable[[], None] | None = None,
        is_hosted: bool = False,
    ) -> None:
        placement = shard.placement
        layer_bytes = shard.compute.slot_bytes / placement.num_moe_layers
        bounds = limits(device, is_hosted, layer_bytes, whole_rows(shard.spec))
        self._block = MailboxBlock.open(options.block, options.num_routers, placement.num_shards)
        self._server = IpcServer(
            open_device(device, own_stream=True),
            self._block,
            shard.shard_idx,
            message_shape(shard.spec, options, device),
            placement.num_moe_layers,
            shard.compute.for_jobs(bounds.job_tokens, placement.num_shards, is_hosted),
            lambda: shard.served,
            bounds,
            on_failure,
        )
        self._server.start()

    def attach(self, handles: RouterHandles) -> ShardHandles:
        """From now on this router is served. Raises TransportError, RuntimeError (IpcServer.attach)."""
        return self._server.attach(handles)

    def launching_s(self) -> float:
        """For how long a launch has been under way, 0 for none."""
        return self._server.launching_s

    def refresh(self) -> None:
        """The shard serves other generations now; when this returns its device knows."""
        self._server.refresh()

    def status(self) -> dict[str, Any]:
        """In the words of ShardStats. buffer_bytes: of the device's memory, the routers' inboxes included."""
        stats = self._server.stats
        return {
            "requests": stats.messages,
            "tokens": stats.tokens,
            "coalesced": stats.joined,
            "failed": stats.refused,
            "ipc_buffer_bytes": self._server.buffer_bytes,
        }

    def close(self) -> None:
        """Jobs that are launched end first."""
        self._server.stop()
        self._block.close()

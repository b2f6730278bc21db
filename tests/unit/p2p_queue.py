"""A shard's desk as routers' headers and flags fill it, for what `take` makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep.kernels import p2p, p2p_layout
from ep.kernels.p2p_layout import MessageShape, pack_header

SMALL = MessageShape(12, 128, 1, torch.bfloat16)


@dataclass
class Queue:
    """A desk with several routers, whose messages have nothing but headers and flags."""

    desk: p2p.Desk
    job: p2p.Job
    inboxes: torch.Tensor
    host: torch.Tensor

    @classmethod
    def make(cls, num_routers: int) -> Queue:
        inboxes = torch.zeros(num_routers, SMALL.inbox_bytes, dtype=torch.uint8)
        host = torch.zeros(p2p_layout.shard_words(num_routers), dtype=torch.int32)
        desk = p2p.Desk.allocate(num_routers, torch.device("cpu"), host.data_ptr())
        desk.inboxes.copy_(torch.tensor([inbox.data_ptr() for inbox in inboxes]))
        desk.served[:2] = torch.tensor([7, 9])
        return cls(desk, p2p.Job.allocate(SMALL, 16, torch.device("cpu")), inboxes, host)

    def write(self, router: int, seq: int, tokens: int, layer: int, generation: int, rows: int) -> None:
        """rows: of which tokens there is a row, by bits."""
        word = pack_header(seq, layer, tokens, generation)
        self.inboxes[router, SMALL.header_offset :].view(torch.int64)[0] = word
        flags = torch.tensor([2 * seq + (rows >> token & 1) for token in range(tokens)], dtype=torch.int32)
        self.inboxes[router, SMALL.flags_offset :].view(torch.int32)[:tokens] = flags

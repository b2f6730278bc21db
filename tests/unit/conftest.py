"""Where there is no GPU, unit tests run Triton's kernels in its interpreter. What tests of the ipc data plane share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from ep.transport.mailbox import MailboxBlock
    from tests.unit.ipc_rig import Rig

if find_spec("triton") is not None and not torch.cuda.is_available():
    from tests.unit.interpreter import install

    install()


@pytest.fixture
def block() -> Iterator[MailboxBlock]:
    from tests.unit.ipc_rig import open_block

    with open_block() as block:
        yield block


@pytest.fixture(params=["asked", "ahead"])
def rig(block: MailboxBlock, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Two routers and two shards, which launch jobs for messages that are there, or ahead of them."""
    from tests.unit.ipc_rig import AHEAD, LIMITS, Rig

    with closing(Rig(block, num_routers=2, limits=AHEAD if request.param == "ahead" else LIMITS)) as rig:
        yield rig

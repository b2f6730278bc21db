"""Routers on GPUs of their own fall into step, with the weights that they have there."""

from __future__ import annotations

import pytest
import torch

from ep.bench.joining import JoiningOptions, run


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_messages_of_routers_that_decode_come_together(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(JoiningOptions(routers=2, num_tokens=(64,), seconds=1.0)).found
    (in_step,) = [one for one in found if one.waits and not one.stalls]
    assert in_step.joined > 0.9, in_step
    assert '"bench": "joining"' in capsys.readouterr().out

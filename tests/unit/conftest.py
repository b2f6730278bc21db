"""Where there is no GPU, unit tests run Triton's kernels in its interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import torch

if find_spec("triton") is not None and not torch.cuda.is_available():
    from tests.unit.interpreter import install

    install()

"""Which tokens of the running step are decode tokens, as vLLM's attention sees it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


def token_phases() -> npt.NDArray[np.bool_] | None:
    """bool [n] over the step's n tokens in the order of their rows, True for those of requests with one query token.

    Called within a forward pass. Rows beyond n are padding. None where this vLLM does not say: no forward context, no
    `query_start_loc` in its attention metadata, or a batch that is split into microbatches. Tokens that a drafter adds
    to a request make it look like prefill.
    """
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return None
    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, Mapping):  # by attention layer; all of one batch
        metadata = next(iter(metadata.values()), None)
    starts = getattr(metadata, "query_start_loc", None)
    if starts is None:
        return None
    lengths = np.diff(starts.cpu().numpy())
    return np.repeat(lengths == 1, lengths)

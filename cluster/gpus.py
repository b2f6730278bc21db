"""Which GPU an actor of ours uses. CUDA and HIP differ only in the names of variables.

Ray gives an actor its GPUs by hiding all others from it. Buffers of other GPUs on the node must be opened here too, so
we keep them visible and put our own where the code that picks "GPU number n" looks for it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
KEEP_VISIBLE = {f"RAY_EXPERIMENTAL_NOSET_{name}": "1" for name in VISIBLE}
"""Environment of an actor whose other GPUs Ray is not to hide."""


def order(mine: str, all_ids: Sequence[str], place: int) -> list[str]:
    """All GPUs, `mine` at `place`. Raises ValueError where it is not among them or there is no such place."""
    others = [gpu_id for gpu_id in all_ids if gpu_id != mine]
    if len(others) == len(all_ids) or not 0 <= place <= len(others):
        raise ValueError(f"GPU {mine} at place {place} of {', '.join(all_ids)}")
    return [*others[:place], mine, *others[place:]]


def claim(place: int = 0) -> None:
    """Make the GPU that Ray reserved for this actor cuda:`place`. Before CUDA or HIP is used; no-op without a GPU."""
    import ray

    reserved = [str(gpu_id) for gpu_id in ray.get_gpu_ids()]
    if not reserved:
        return
    from ep.devices import gpu_ids

    visible = ",".join(order(reserved[0], gpu_ids(), place))
    for name in VISIBLE:
        os.environ[name] = visible

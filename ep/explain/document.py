"""An explanation as one JSON document."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ep.explain.explanation import Explanation

FORMAT = 1


def document(explanation: Explanation, versions: dict[str, str], checked: str | None) -> dict[str, Any]:
    """versions: of what is installed. checked: the checkpoint whose tensors were compared, None for none."""
    found = asdict(explanation)
    spec = found.pop("spec")
    spec.pop("source")
    router, batch = explanation.router, explanation.question.batch
    found["parts"] = [
        {
            "name": part.name,
            "holder": part.holder,
            "layers": len(part.layers),
            "experts": part.experts,
            "tensors": [{"shape": tensor.shape, "scale_shape": tensor.scale_shape} for tensor in part.tensors],
            "params": part.params,
            "active_params": part.active_params,
            "bytes": part.bytes,
        }
        for part in explanation.parts
    ]
    found["layout"] |= {"gpus": explanation.layout.gpus, "gpus_needed": explanation.layout.gpus_needed}
    found["router"]["requests_left"] = max(0, router.requests - batch.num_requests)
    found["tuned"] = [{"device": key, "files": [asdict(row) for row in rows]} for key, rows in explanation.tuned]
    return {"format": FORMAT, "versions": versions, "checked_checkpoint": checked, "config": spec, **found}

"""What the models' makers say of their sizes, to hold the sums beside."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedSize:
    """params: of the model proper; active_params: of one token; with_next_token: multi-token prediction included."""

    params: float
    active_params: float
    source: str
    with_next_token: float | None = None


PUBLISHED = {
    "deepseek-v3": PublishedSize(671e9, 37e9, "DeepSeek-V3 report: 671B, 37B active; model card: 685B with MTP", 685e9),
    "mixtral-8x7b": PublishedSize(46.7e9, 12.9e9, "Mistral AI, Mixtral of experts: 46.7B, 12.9B active"),
    "mixtral-8x22b": PublishedSize(140.6e9, 39e9, "Mistral AI, Mixtral 8x22B: 141B, 39B active; 140.6B in its files"),
}
"""By the preset's name."""

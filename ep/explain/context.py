"""max_model_len and where it comes from, as vLLM derives it (`_get_and_verify_max_len` of 0.32)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ep.errors import OptionError

ALREADY_SCALED = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
"""Kinds of rope scaling whose max_position_embeddings counts the scaled positions."""

LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)


@dataclass(frozen=True)
class ContextLength:
    """tokens: max_model_len. derived: what the config gives where nothing is asked for. why: in words."""

    tokens: int
    derived: int
    key: str
    why: str


def context_length(config: Mapping[str, Any], asked: int | None = None) -> ContextLength:
    """config: a Hugging Face config.json with at least max_position_embeddings; asked: --max-model-len.

    Raises OptionError for a length beyond what the config gives, as vLLM does.
    """
    lengths = {key: config[key] for key in LENGTH_KEYS if config.get(key) is not None}
    key = "model_max_length" if "model_max_length" in lengths else min(lengths, key=lambda name: lengths[name])
    derived, why = lengths[key], f"{key} of the config"
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind in ALREADY_SCALED:
        why += f"; {kind} scaling, which it already counts"
        if rope.get("original_max_position_embeddings"):
            why += f" ({rope['original_max_position_embeddings']:,} x {rope.get('factor', 1):g})"
    elif rope.get("factor"):
        derived, why = int(derived * rope["factor"]), f"{why}, {derived:,} x {rope['factor']:g} ({kind} scaling)"
    if asked is None:
        return ContextLength(derived, derived, key, why)
    if asked > derived:
        raise OptionError(f"--max-model-len {asked}: expected at most {derived} ({why})")
    return ContextLength(asked, derived, key, f"--max-model-len; the config allows {derived:,} ({why})")

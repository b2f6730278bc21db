"""A file of prompts for vLLM's benchmark client: one JSON object a line, {"prompt": TEXT, "output_tokens": N}."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep.errors import OptionError

_KEYS = {"prompt", "output_tokens"}


@dataclass(frozen=True)
class PromptFile:
    """A file that the client will take. output_len: of every request; None: as the lines say."""

    path: str
    num_prompts: int
    output_len: int | None


def check_prompts(path: str, output_len: int | None) -> PromptFile:
    """The file at `path`, each line checked. output_len: instead of the lines' own output_tokens.

    Raises OptionError with the path and the line.
    """
    if not path.endswith(".jsonl"):
        raise OptionError(f"--prompts {path}: expected a name that ends in .jsonl")
    try:
        lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--prompts {path}: {getattr(error, 'strerror', None) or error}") from error
    if lines == [""]:
        raise OptionError(f"--prompts {path}: holds no prompt")
    for number, line in enumerate(lines, 1):
        wrong = _wrong(line, output_len is None)
        if wrong:
            raise OptionError(f"--prompts {path}:{number}: {wrong}")
    return PromptFile(str(Path(path).resolve()), len(lines), output_len)


def _wrong(line: str, needs_length: bool) -> str | None:
    """What is wrong with a line, None if nothing is."""
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        return f"no JSON: {error}"
    if not isinstance(found, dict):
        return f"is {type(found).__name__}, expected an object with a prompt"
    unknown = sorted(found.keys() - _KEYS)
    if unknown:
        return f"unknown key {unknown[0]}, expected prompt and output_tokens"
    prompt, length = found.get("prompt"), found.get("output_tokens")
    if not isinstance(prompt, str) or not prompt:
        return f"prompt is {json.dumps(prompt)}, expected text"
    if length is None and needs_length:
        return "has no output_tokens, expected a number in every line, or --output-len for all of them"
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
        return f"output_tokens is {json.dumps(length)}, expected a whole number of at least 1"
    return None

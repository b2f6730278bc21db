"""The tokenizer of a stand-in: byte-level BPE, so that any text round-trips, and syllables for its own text."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from ep.errors import ModelError
from ep.model import ModelSpec

CHAT_TEMPLATES = {
    "deepseek_v3": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}"
        "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
        "{% else %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
    ),
    "mixtral": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\n' }}"
        "{% elif message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
}


@dataclass(frozen=True)
class Vocabulary:
    """The stand-in's tokens: specials, the 256 bytes, then the syllables and words of two and, in large ones, three
    syllables that its text is of."""

    specials: tuple[str, ...]
    tokens: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]

    @property
    def num_text(self) -> int:
        """How many tokens, the last ones, are text that an expert may vote for."""
        return len(self.tokens) - len(self.specials) - 256


def vocabulary(spec: ModelSpec) -> Vocabulary:
    """A byte-level BPE vocabulary of vocab_size tokens. Raises ModelError for a size that does not fit."""
    specials = {
        "deepseek_v3": (
            "<｜begin▁of▁sentence｜>",
            "<｜end▁of▁sentence｜>",
            "<｜▁pad▁｜>",
            "<｜User｜>",
            "<｜Assistant｜>",
        ),
        "mixtral": ("<unk>", "<s>", "</s>"),
    }[spec.family]
    syllables = [c + v for c in "bdfghjklmnprstvwyz" for v in "aeiou"]
    space = "\u0120"  # what byte-level BPE writes for a space
    merges = [(s[0], s[1]) for s in syllables] + [(space, s) for s in syllables]
    words = [(space + first, second) for first in syllables for second in syllables]
    num_words = spec.vocab_size - len(specials) - 256 - len(merges)
    most = len(words) * (1 + len(syllables))
    if not 0 < num_words <= most:
        raise ModelError(
            f"{spec.source}: vocab_size is {spec.vocab_size}, expected {spec.vocab_size - num_words + 1} to "
            f"{spec.vocab_size - num_words + most} for a synthetic checkpoint"
        )
    merges += _spread(words, min(num_words, len(words)))
    longer = [(first + second, third) for first, second in words for third in syllables]
    merges += _spread(longer, max(0, num_words - len(words)))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return Vocabulary(specials, (*specials, *alphabet, *(a + b for a, b in merges)), tuple(merges))


def _spread(words: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """count of the words, from all over the list."""
    stride = next(n for n in range(int(len(words) * 0.618), len(words)) if math.gcd(n, len(words)) == 1)
    return [words[i * stride % len(words)] for i in range(count)]


def write_tokenizer(spec: ModelSpec, path: Path, bos_token_id: int, eos_token_id: int) -> None:
    vocab = vocabulary(spec)
    tokenizer = Tokenizer(models.BPE({token: idx for idx, token in enumerate(vocab.tokens)}, list(vocab.merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in vocab.specials])
    bos, eos = vocab.tokens[bos_token_id], vocab.tokens[eos_token_id]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_token_id)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": spec.max_position_embeddings,
        "chat_template": CHAT_TEMPLATES[spec.family],
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (path / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

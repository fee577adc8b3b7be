"""Text to learn from: the reference of the language that Python ships for `help()`, character by character.

It differs from one version of Python to the next: what was learnt from it is kept by its digest (`text_digest`).

Dimensions: B batch, N tokens.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

from ddfast.errors import DDFastError
from ddfast.models.text.tokenizer import ALPHABET, as_codes

HELD_OUT = 20
"""Of so many paragraphs the first is held out."""


@lru_cache(maxsize=2)
def reference(split: str) -> str:
    """Paragraphs of the language reference ("train": 19 of 20; "test": the others), an end of line after each.

    Each is there once, however many topics have it, in the order of the topics' names; white space inside is a blank
    each, lines that only underline and characters outside the alphabet are left out.

    Raises:
        DDFastError: this Python has no such text.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: got {split!r}, expected 'train' or 'test'")
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        lacks = "which this Python lacks; most have it in their standard library"
        raise DDFastError(f"the recipe text learns from Python's pydoc_data.topics, {lacks}") from error
    kept = set(ALPHABET)
    paragraphs: dict[str, None] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            lines = [line for line in paragraph.splitlines() if any(map(str.isalnum, line))]
            paragraphs["".join(filter(kept.__contains__, " ".join(" ".join(lines).split())))] = None
    paragraphs.pop("", None)
    chosen = [text for place, text in enumerate(paragraphs) if (place % HELD_OUT == 0) == (split == "test")]
    return "".join(f"{text}\n" for text in chosen)


def text_digest() -> str:
    """Twelve hex digits that tell this Python's reference from others'."""
    return hashlib.sha256((reference("train") + reference("test")).encode()).hexdigest()[:12]


@lru_cache(maxsize=2)
def _codes(split: str) -> Tensor:
    return as_codes([reference(split)])[0]


def windows(split: str, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Codes int64 [count, length] of the text from random places on."""
    codes = _codes(split)
    first = torch.randint(len(codes) - length + 1, (count, 1), generator=generator, dtype=torch.int64)
    return codes[first + torch.arange(length, dtype=torch.int64)]

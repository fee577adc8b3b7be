"""Characters and their codes.

Dimensions: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
"""The characters, in the order of their codes: the end of a paragraph, and what ASCII can print."""


def as_codes(texts: Sequence[str]) -> Tensor:
    """Codes int64 [B, N] of texts of one length.

    Raises:
        ValueError: a character is not in the alphabet, or lengths differ.
    """
    strange = sorted(set("".join(texts)) - set(ALPHABET))
    if strange or len({len(text) for text in texts}) > 1:
        got = f"the character {strange[0]!r}" if strange else "several lengths"
        raise ValueError(
            f"texts: got {got}, expected texts of one length of ASCII's printable characters and ends of line"
        )
    table = {character: code for code, character in enumerate(ALPHABET)}
    return torch.tensor([[table[character] for character in text] for text in texts], dtype=torch.int64)


def as_texts(codes: Tensor) -> list[str]:
    """What codes int64 [B, N] say."""
    return ["".join(map(ALPHABET.__getitem__, row)) for row in codes.tolist()]

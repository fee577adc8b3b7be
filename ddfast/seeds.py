"""Seeds: every number a user may give is a seed of its own, and of every kind of randomness.

PyTorch's generators on the CPU read the low 32 bits of a seed and no more: 2^32 would draw what 0 draws. Here the high
bits are folded into the low ones: seeds below 2^32 stay what they are to PyTorch, others never meet their remainder.
"""

from __future__ import annotations

from numbers import Integral

import torch

LIMIT = 2**64
"""Seeds are below it: it is what `ddfast.noise` and PyTorch take."""

_ODD = 0x9E3779B9
"""Times an odd number, no two high halves fold to the same 32 bits, and none but 0 to 0."""


def check_seed(seed: object) -> int:
    """The seed; raise `TypeError` or `ValueError` unless it is an integer in 0..2^64 - 1."""
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise TypeError(f"seed: got {seed!r}, expected an integer")
    if not 0 <= int(seed) < LIMIT:
        raise ValueError(f"seed: got {seed}, expected 0 to 2^64 - 1")
    return int(seed)


def derived(seed: int, number: int) -> int:
    """A seed of `ddfast.noise` for another purpose, `number` further on."""
    return (check_seed(seed) + number) % LIMIT


def folded(seed: int) -> int:
    """The 32 bits that stand for a seed in PyTorch's generators."""
    low, high = check_seed(seed) % 2**32, seed >> 32
    return low ^ (high * _ODD % 2**32)


def seed_all(seed: int) -> None:
    """Seed PyTorch's own generators, which initialise networks."""
    torch.manual_seed(folded(seed))


def generator(seed: int, device: torch.device | str = "cpu", *, number: int = 0) -> torch.Generator:
    """A generator of its own; one for another purpose is `number` further on."""
    return torch.Generator(device).manual_seed((folded(seed) + number) % 2**32)

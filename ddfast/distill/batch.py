"""A step's batch, in parts: a sample depends on its number alone, whichever process or micro-batch makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ddfast.models.autoregressive import Condition
from ddfast.ops import noise


@dataclass(kw_only=True)
class Part:
    """The samples `first` to `last` - 1 of a step's batch of `size`, and their chance.

    Every part has a generator of its own in the step's state and draws from it what the others draw: what is one number
    per sample, for the whole batch, of which it keeps its own (`own`); what is many, by a seed and the sample's number
    (`noise`). So a sample's chance depends on (step, number) alone, however the batch is split.
    """

    size: int
    first: int
    last: int
    generator: torch.Generator

    @classmethod
    def whole(cls, size: int, generator: torch.Generator) -> Part:
        """A batch in one part."""
        return cls(size=size, first=0, last=size, generator=generator)

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def share(self) -> float:
        """Of the batch, by samples: what a mean over this part weighs in the batch's."""
        return len(self) / self.size

    def own(self, drawn: Tensor, dim: int = 0) -> Tensor:
        """This part of what was drawn for the whole batch, along a dimension."""
        return drawn.narrow(dim, self.first, len(self))

    def integers(self, limit: int) -> Tensor:
        """One number int64 [b] below `limit` per sample of this part."""
        return self.own(torch.randint(limit, (self.size,), generator=self.generator, dtype=torch.int64))

    def shared_seed(self) -> int:
        """A seed that all parts share."""
        return int(torch.randint(2**62, (), generator=self.generator, dtype=torch.int64))

    def noise(self, seed: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Standard normal float32 [b, *shape], a function of the seed and the samples' numbers."""
        return noise(seed, torch.arange(self.first, self.last, dtype=torch.int64), shape, device)


@dataclass(kw_only=True)
class Batch:
    """Noise [B, N, D], conditions, and where a method learns from data the codes int64 [B, N] that go with them."""

    noise: Tensor
    condition: Condition
    codes: Tensor | None = None


class Draw(Protocol):
    """Makes a part of a batch, all of its randomness from it; codes only where they are read."""

    def __call__(self, part: Part, codes: bool = True) -> Batch:
        """The part's samples."""

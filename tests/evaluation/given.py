"""Features that are there, in place of Inception's."""

import torch
from torch import Tensor

from ddfast.evaluation.images import Batch
from ddfast.evaluation.inception import LOGITS, POOL, SPATIAL
from ddfast.evaluation.instruments import Adm, Reference


class Given(Adm):
    """adm of features that are there: an image is the number of its features."""

    def __init__(self, **features: Tensor) -> None:
        self.features = features

    def look(self, images: Tensor) -> dict[str, Tensor]:
        return {name: self.features[key][images] for name, key in ((POOL, "pool"), (SPATIAL, "space"), (LOGITS, "say"))}


def given(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(24, 24, generator=generator)
    return {
        "pool": (torch.randn(count, 24, generator=generator) @ mixed / 5 + 0.5).relu(),
        "space": torch.randn(count, 10, generator=generator).relu(),
        "say": 2 * torch.randn(count, 16, generator=generator),
    }


def numbers(count: int, size: int, *, shuffled: bool = False):
    number = torch.arange(count, dtype=torch.int64)
    if shuffled:
        number = number[torch.randperm(count, generator=torch.Generator().manual_seed(1))]
    return [Batch(rows, rows, rows) for rows in number.split(size)]


def reference_of(features: dict[str, Tensor]) -> Reference:
    return Given(**features).see(numbers(len(features["pool"]), 64)).reference()

"""Lengths of paths in a space whose images are its embeddings; in a module that other processes can import."""

from torch import Tensor

from ddfast import processes
from ddfast.config import ParallelConfig
from ddfast.evaluation.paths import Distance, path_lengths
from ddfast.models.toy import ToyTeacher

SETTINGS = {"count": 40, "seed": 3, "batch_size": 16}
SQUARED = Distance(name="squared", between=lambda one, other: (one - other).double().square().sum((1, 2, 3)))


class Plain(ToyTeacher):
    """Its images are its embeddings, as they are."""

    def decode(self, codes: Tensor, *, clamp: bool = True) -> Tensor:
        return codes[:, None]


def lengths(**other: int) -> Tensor:
    return path_lengths(lambda _, eps: eps.sin(), Plain(num_tokens=6), SQUARED, **{**SETTINGS, **other})


def shared_lengths() -> Tensor:
    with processes.together("cpu", ParallelConfig().timeout):
        return lengths(batch_size=7)

"""Precision and recall of samples: how many lie on the manifold of real images, and the reverse.

A manifold is what lies no farther from one of a set's features than its k-th nearest other one. Kynkäänniemi et al.
2019; OpenAI's evaluator and torch-fidelity have the same definition.

Dimensions: M samples, N reference, F features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ddfast.progress import Progress, silent

NEIGHBOUR = 3
"""k, as everybody has it."""

_BLOCK = 2**24
"""Distances held at a time."""


def precision_and_recall(
    samples: Tensor, reference: Tensor, *, neighbour: int = NEIGHBOUR, progress: Progress = silent
) -> tuple[float, float]:
    """Share of the samples [M, F] on the reference's manifold, and of the reference [N, F] on the samples'.

    Args:
        samples, reference: features on one device.
        neighbour: k.
        progress: called as progress(done, total, text) after every block of distances.

    Numerics: distances in float64, so that none is decided by rounding.
    Memory: both sets in float64, and 2^24 distances.

    Raises:
        ValueError: a set has not more than k features.
    """
    for name, features in (("samples", samples), ("reference", reference)):
        if len(features) <= neighbour:
            raise ValueError(f"{name}: got {len(features)}, expected more than {neighbour} for precision and recall")
    middle = reference.double().mean(0)  # distances by products are exact to the square of the features' size
    x, y = samples.double() - middle, reference.double() - middle
    total, done = 2 * len(x) + len(y), 0

    def tell(rows: Tensor) -> None:
        nonlocal done
        done += len(rows)
        progress(done, total, "precision and recall")

    def radii(features: Tensor) -> Tensor:
        found = []
        for rows, squares in _squared_distances(features, features):
            found.append(squares.kthvalue(neighbour + 1, dim=1).values)  # the nearest of all is the feature itself
            tell(rows)
        return torch.cat(found)

    of_samples, of_reference = radii(x), radii(y)
    precise, recalled = [], torch.zeros(len(y), dtype=torch.bool, device=y.device)
    start = 0
    for rows, squares in _squared_distances(x, y):
        precise.append((squares <= of_reference).any(1))
        recalled |= (squares <= of_samples[start : start + len(rows), None]).any(0)
        start += len(rows)
        tell(rows)
    return float(torch.cat(precise).double().mean()), float(recalled.double().mean())


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of x [M, F], and their squared distances to all of y [N, F]."""
    norms = y.square().sum(1)
    for rows in x.split(max(1, _BLOCK // len(y))):
        squares = torch.addmm(norms + rows.square().sum(1, keepdim=True), rows, y.T, alpha=-2)
        yield rows, squares.clamp_min_(0)

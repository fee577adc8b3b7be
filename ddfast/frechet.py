"""Fréchet distance of two sets of features, from sums that take no more memory for more samples, and its spread.

Dimensions: B batch, F features, R rank, G groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ddfast import processes

GROUPS = 5
"""Disjoint parts of the samples, each of which is left out once to tell the spread of a distance."""

_STEP = round((618 + (5**0.5 - 1) / 2) / 1000 * 2**32)
"""Of 2^32, about the golden ratio's part for each sample, and for every 1000th again."""


def group_of(number: Tensor) -> Tensor:
    """The group int64 [B] of the samples `number` int64 [B], whatever batch or process they are in.

    Multiples of the golden ratio, less their whole part, lie evenly in [0, 1). The step is one for numbers that follow
    each other as for every 1000th, which have one class where 1000 classes come in turn: both fall into groups of
    nearly equal size.
    """
    return (number * _STEP % 2**32) * GROUPS >> 32


@dataclass(frozen=True)
class Gaussian:
    """Mean [F] and covariance [F, F] of features, float64 on the CPU, and of how many (0: not known)."""

    mean: Tensor
    covariance: Tensor
    count: int = 0

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """The Gaussian fitted to features [B, F]."""
        moments = Moments()
        moments.add(features, torch.arange(len(features), dtype=torch.int64))
        return moments.whole()

    @cached_property
    def root(self) -> Tensor:
        """[F, R], the covariance's root in as many directions as it has: root root^T is the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        # Below it, eigenvalues of a singular covariance are rounding, and their roots would not be.
        there = values > len(values) * torch.finfo(torch.float64).eps * values[-1].clamp_min(0)
        return vectors[:, there] * values[there].sqrt()


class Moments:
    """Counts, means and covariances of features that are added batch by batch, in `GROUPS` disjoint groups.

    Numerics: float64; a batch's sums are taken about its own mean, so features far from zero lose nothing.
    Memory: G (F + 1) F float64, on the features' device, however many are added.
    Source: Chan et al. 1979 (merging means and sums of squares).
    """

    def __init__(self) -> None:
        self.count = torch.zeros(GROUPS, dtype=torch.float64)
        self.mean = torch.zeros(GROUPS, 0, dtype=torch.float64)
        self.scatter = torch.zeros(GROUPS, 0, 0, dtype=torch.float64)

    def add(self, features: Tensor, number: Tensor) -> None:
        """Add features [B, F] of the samples `number` int64 [B].

        Raises:
            ValueError: the features have another width than those before, or are not finite.
        """
        rows, width = features.double(), features.shape[1]
        if not rows.isfinite().all():
            raise ValueError("features: got NaN or infinite ones, expected finite ones")
        if not self.count.any():
            self.mean = rows.new_zeros(GROUPS, width)
            self.scatter = rows.new_zeros(GROUPS, width, width)
        if width != self.mean.shape[1]:
            raise ValueError(f"features: got {width} of a sample, expected {self.mean.shape[1]} as before")
        groups = group_of(number).to(rows.device)
        for group in range(GROUPS):
            own = rows[groups == group]
            if len(own):
                before, count = float(self.count[group]), len(own)
                mean = own.mean(0)
                centred = own - mean
                apart = mean - self.mean[group]
                self.scatter[group].addmm_(centred.T, centred)
                self.scatter[group].addr_(apart, apart, alpha=before * count / (before + count))
                self.mean[group] += apart * (count / (before + count))
                self.count[group] += count

    def shared(self) -> Moments:
        """Those of what all processes have added, on the CPU; all of them ask at the same point."""
        width = max(processes.gather(self.mean.shape[1]))
        if processes.count() == 1:
            return self
        own, all_of_it = self if self.mean.shape[1] else _nothing(width), _nothing(width)
        processes.total(all_of_it.count.copy_(own.count))
        sums = processes.total(own.mean.cpu() * own.count[:, None])
        all_of_it.mean.copy_(sums / all_of_it.count.clamp_min(1)[:, None])
        for group in range(GROUPS):
            apart = own.mean[group].cpu() - all_of_it.mean[group]
            scatter = all_of_it.scatter[group].copy_(own.scatter[group])
            processes.total(scatter.addr_(apart, apart, alpha=float(own.count[group])))
        return all_of_it

    def whole(self) -> Gaussian:
        """The Gaussian of all samples.

        Raises:
            ValueError: there are fewer than two.
        """
        return self._merged(range(GROUPS))

    def without(self, group: int) -> Gaussian:
        """The Gaussian of the samples outside one group; errors as of `whole`."""
        return self._merged(other for other in range(GROUPS) if other != group)

    def _merged(self, groups: Iterable[int]) -> Gaussian:
        rows = list(groups)
        counts, means = self.count[rows], self.mean[rows].cpu()
        count = int(counts.sum())
        if count < 2:
            raise ValueError(f"features: got {count} samples, expected at least 2 for a covariance")
        mean = (counts[:, None] * means).sum(0) / count
        covariance = (means - mean).T @ (counts[:, None] * (means - mean))
        for row in rows:
            covariance += self.scatter[row].cpu()
        return Gaussian(mean, covariance / (count - 1), count)


def _nothing(width: int) -> Moments:
    """Moments of no features yet, of a width."""
    made = Moments()
    made.mean = torch.zeros(GROUPS, width, dtype=torch.float64)
    made.scatter = torch.zeros(GROUPS, width, width, dtype=torch.float64)
    return made


def frechet_distance(samples: Gaussian | Moments, reference: Gaussian | Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians, or of those fitted to features.

    The root's trace is the sum of the roots of the eigenvalues of L^T S1 L, a symmetric matrix, with S2 = L L^T; of
    them, no more than S1's rank are not zero. So covariances may be singular.

    Numerics: float64.

    Raises:
        ValueError: they have different numbers of features.

    Source: Heusel et al. 2017 (FID), with features of any network.
    """
    x, y = (fitted.whole() if isinstance(fitted, Moments) else fitted for fitted in (samples, reference))
    if x.mean.shape != y.mean.shape:
        raise ValueError(f"reference: got {len(y.mean)} features of a sample, expected {len(x.mean)} as of the samples")
    values = torch.linalg.eigvalsh(y.root.T @ x.covariance @ y.root).flip(0)
    root = values[: x.count - 1 if x.count else None].clamp_min(0).sqrt().sum()
    distance = (x.mean - y.mean).square().sum() + x.covariance.trace() + y.covariance.trace() - 2 * root
    return float(distance.clamp_min(0))  # of equal sets, rounding has a sign


def frechet_error(samples: Moments, reference: Gaussian) -> float | None:
    """The standard error of `frechet_distance` by the chance of the samples, not of the reference.

    The delete-a-group jackknife: the spread of the distances without one group each. None: there are too few samples
    for groups.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 11.
    """
    if samples.count.min() < 2:
        return None
    left = torch.tensor(
        [frechet_distance(samples.without(group), reference) for group in range(GROUPS)], dtype=torch.float64
    )
    return float(((GROUPS - 1) / GROUPS * (left - left.mean()).square().sum()).sqrt())

"""Fréchet distance of two sets of features."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of the Gaussians fitted to features [B, F] and reference [B', F].

    In float64; the root's trace is the sum of the roots of S1 S2's eigenvalues, which are real and not negative, so
    covariances may be singular.

    Source: Heusel et al. 2017 (FID), with features of any network.
    """
    x, y = features.double(), reference.double()
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    root = torch.linalg.eigvals(cov_x @ cov_y).real.clamp_min(0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * root)

"""Closed forms in float64 NumPy, written independently of the package, and random inputs for comparing with them."""

import itertools
import math

import numpy as np
import torch

TOLERANCE = {
    # (op, dtype): absolute tolerance for inputs of order one.
    ("filter_logits", torch.float32): 2e-5,
    ("filter_logits", torch.bfloat16): 2e-5,
    ("filter_logits", torch.float16): 2e-5,
    ("codebook_posterior", torch.float32): 1e-4,
    ("codebook_posterior", torch.bfloat16): 2e-2,
    ("codebook_posterior", torch.float16): 2e-3,
    ("decode_attention", torch.float32): 5e-6,
    ("decode_attention", torch.bfloat16): 2e-2,  # twice its rounding: Triton's interpreter truncates
    ("decode_attention", torch.float16): 2e-3,
    ("add_norm", torch.float32): 2e-6,
    ("add_norm", torch.bfloat16): 4e-2,
    ("add_norm", torch.float16): 5e-3,
    ("add_norm on a GPU", torch.float32): 1e-5,  # whose reciprocal roots and quotients are approximate
    ("add_norm on a GPU", torch.bfloat16): 4e-2,
    ("add_norm on a GPU", torch.float16): 5e-3,
    ("norm_linear", torch.float32): 2e-6,
    ("norm_linear", torch.bfloat16): 4e-2,  # twice what it is: Triton's interpreter truncates
    ("norm_linear", torch.float16): 3e-3,
    ("norm_linear on a GPU", torch.float32): 2e-5,
    ("norm_linear on a GPU", torch.bfloat16): 4e-2,
    ("norm_linear on a GPU", torch.float16): 5e-3,
    ("append_normed", torch.float32): 1e-6,
    ("append_normed", torch.bfloat16): 8e-3,
    ("append_normed", torch.float16): 1e-3,
    ("activate", torch.float32): 1e-6,
    ("activate", torch.bfloat16): 8e-3,
    ("activate", torch.float16): 1e-3,
}


def nearest_distance(x: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Squared distances [rows, V] by differences, not by expanding the square."""
    return np.stack([((codebook - row) ** 2).sum(-1) for row in x])


def filtered(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """One row at a time, in plain Python, by docs/method.md section 19 (Official code: logit filters)."""
    out = np.full(logits.shape, -np.inf)
    for row, target in zip(logits, out, strict=True):
        scaled = row / temperature
        keep = np.isfinite(scaled)
        if 0 < top_k < len(row):
            keep &= scaled >= np.sort(scaled)[-top_k]
        weight = np.where(keep, np.exp(scaled - scaled.max()), 0.0)
        order = sorted(np.flatnonzero(keep), key=lambda j: (-scaled[j], j))
        if top_p < 1:
            mass, kept = 0.0, []
            for j in order:
                if kept and mass >= top_p * weight.sum():
                    break
                kept.append(j)
                mass += weight[j]
            order = kept
        target[order] = scaled[order] - scaled.max() - math.log(weight[order].sum())
    return out


def posterior(x: np.ndarray, t: np.ndarray, log_probs: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """sum_j w_j c_j with w_j ∝ p_j exp(-|x - (1-t) c_j|^2 / (2 t^2)), distances by differences."""
    out = []
    for row, time, log_p in zip(x, t, log_probs, strict=True):
        exponent = log_p - ((row - (1 - time) * codebook) ** 2).sum(-1) / (2 * time**2)
        weight = np.exp(exponent - exponent.max())
        out.append(weight @ codebook / weight.sum())
    return np.stack(out)


def flow_codes(log_probs: np.ndarray, noise: np.ndarray, codebook: np.ndarray, steps: int) -> np.ndarray:
    """Codes reached by Heun's method for dx/dt = (x - x0_hat)/t in plain (x, t), t equally spaced in logit(t).

    Shares no coordinate, grid, start or coefficient with the package's solvers.
    """
    times = 1 / (1 + np.exp(-np.linspace(9.0, -7.0, steps + 1)))
    times[0] = 1.0
    x = noise.copy()

    def velocity(x: np.ndarray, t: float) -> np.ndarray:
        exponent = log_probs + (x @ codebook.T * (1 - t) - (1 - t) ** 2 * (codebook**2).sum(-1) / 2) / t**2
        weight = np.exp(exponent - exponent.max(-1, keepdims=True))
        return (x - weight @ codebook / weight.sum(-1, keepdims=True)) / t

    for t, following in itertools.pairwise(times):
        slope = velocity(x, t)
        ahead = x + (following - t) * slope
        x = x + (following - t) * (slope + velocity(ahead, following)) / 2
    t = times[-1]
    scores = log_probs + (x @ codebook.T * (1 - t) - (1 - t) ** 2 * (codebook**2).sum(-1) / 2) / t**2
    return scores.argmax(-1)


def problem(
    rows: int, num_codes: int, dim: int, *, seed: int = 0, support: float = 1.0, peak: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log_probs [rows, V] with about `support` of the codes left, noise [rows, d] and codebook [V, d], in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    codebook = normal(num_codes, dim)
    logits = peak * normal(rows, num_codes)
    dropped = torch.rand(rows, num_codes, generator=generator) >= support
    dropped[torch.arange(rows), torch.randint(num_codes, (rows,), generator=generator)] = False
    return logits.masked_fill(dropped, -math.inf).log_softmax(-1), normal(rows, dim), codebook

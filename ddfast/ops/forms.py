"""The three forms of a flow's prediction, and how they turn into each other.

Rectified flow: x_t = (1-t) x_0 + t eps, t=1 noise, t=0 data. A network or a closed form that knows E[x_0 | x_t] knows
the velocity dx/dt and the score of x_t's distribution too: docs/method.md section 2 (The closed-form flow).
All tensors are [..., d]; t is a
number or a tensor [...] in (0, 1], and (0, 1) where the velocity is computed from the score.
"""

from __future__ import annotations

from torch import Tensor


def add_noise(x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """x_t = (1-t) x_0 + t noise."""
    t = _column(t)
    return (1 - t) * x0 + t * noise


def velocity_from_x0(x: Tensor, t: Tensor | float, x0: Tensor) -> Tensor:
    """v = (x - x_0) / t."""
    return (x - x0) / _column(t)


def x0_from_velocity(x: Tensor, t: Tensor | float, velocity: Tensor) -> Tensor:
    """x_0 = x - t v."""
    return x - _column(t) * velocity


def score_from_x0(x: Tensor, t: Tensor | float, x0: Tensor) -> Tensor:
    """s = -(x - (1-t) x_0) / t^2."""
    t = _column(t)
    return -(x - (1 - t) * x0) / t**2


def x0_from_score(x: Tensor, t: Tensor | float, score: Tensor) -> Tensor:
    """x_0 = (x + t^2 s) / (1-t)."""
    t = _column(t)
    return (x + t**2 * score) / (1 - t)


def score_from_velocity(x: Tensor, t: Tensor | float, velocity: Tensor) -> Tensor:
    """s = -((1-t) v + x) / t."""
    t = _column(t)
    return -((1 - t) * velocity + x) / t


def velocity_from_score(x: Tensor, t: Tensor | float, score: Tensor) -> Tensor:
    """v = -(t s + x) / (1-t)."""
    t = _column(t)
    return -(t * score + x) / (1 - t)


def _column(t: Tensor | float) -> Tensor | float:
    return t[..., None] if isinstance(t, Tensor) else t

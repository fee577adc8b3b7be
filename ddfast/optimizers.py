"""What updates weights: AdamW, and Muon, whose matrices are orthogonalised, each whole, wherever its parts lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddfast import processes
from ddfast.progress import Progress
from ddfast.schedule import warmup_cosine

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS, _EPS, _RMS = 5, 1e-7, 0.2


class Muon(torch.optim.Optimizer):
    """Muon of matrices, scaled so that one learning rate suits it and AdamW.

    m = lerp(m, g, 1 - momentum); W -= lr (0.2 sqrt(max(rows, columns)) orthogonal(lerp(g, m, momentum)) + decay W)

    `torch.optim.Muon` is the same in bfloat16 alone, whose rounding makes of the last bits of a gradient (another
    number of micro-batches or processes) 1e-3 of the loss within 50 steps; here 1e-7. Of a matrix that processes hold
    in parts, the update is gathered once, not multiplied in parts.

    Args:
        matrices: what it updates, [rows, columns] each.
        weight_decay: decoupled.
        momentum: Nesterov's.
        dtype: in which matrices are orthogonalised.

    Source: Jordan et al. 2024 (Muon); the scale: Liu et al. 2025 (Muon is scalable for LLM training, arXiv 2502.16982).
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        *,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum, "dtype": dtype})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                mean, momentum = state["momentum_buffer"], group["momentum"]
                mean.lerp_(matrix.grad, 1 - momentum)
                update = processes.whole(matrix.grad.lerp(mean, momentum))
                update = processes.like(orthogonal(update.to(group["dtype"])).to(matrix.dtype), matrix)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * _RMS * math.sqrt(max(matrix.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T: five steps of Newton and Schulz' quintic, which leave its S in 0.7..1.2."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=_EPS)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def optimizers(
    network: nn.Module,
    kind: str,
    *,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
    dtype: torch.dtype = torch.float32,
) -> list[torch.optim.Optimizer]:
    """Those of a network's parameters: AdamW, and where it is asked for Muon for its linear layers' weights.

    Args:
        network: whose parameters they update, but for those that have no gradient.
        kind: adamw or muon.
        weight_decay: decoupled.
        betas: of AdamW's moments.
        dtype: in which Muon orthogonalises.
    """
    matrices: list[Tensor] = []
    if kind == "muon":
        linear = (module for module in network.modules() if isinstance(module, nn.Linear))
        matrices = list(dict.fromkeys(module.weight for module in linear))
    taken = set(matrices)
    rest = [parameter for parameter in network.parameters() if parameter not in taken]
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, weight_decay=weight_decay, betas=betas)]
    if matrices:
        made.append(Muon(matrices, weight_decay=weight_decay, dtype=dtype))
    return made


def step_at(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """A step at a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def fit(
    trained: Sequence[torch.optim.Optimizer],
    loss: Callable[[], Tensor],
    *,
    iterations: int,
    learning_rate: float,
    progress: Progress | None = None,
) -> None:
    """Train what the optimizers update: a warm-up of a twentieth, a cosine, and gradients of norm 1 at most.

    Args:
        trained: together they hold every parameter.
        loss: of the next batch.
        iterations: steps.
        learning_rate: peak, of all optimizers.
        progress: called after every step.
    """
    held = (parameter for optimizer in trained for group in optimizer.param_groups for parameter in group["params"])
    parameters = [parameter for parameter in held if parameter.requires_grad]
    for step in range(iterations):
        value = loss()
        for optimizer in trained:
            optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        factor = warmup_cosine(step, total=iterations, warmup=iterations // 20)
        for optimizer in trained:
            step_at(optimizer, factor * learning_rate)
        if progress:
            progress(step + 1, iterations, f"loss {value.item():.4f}")

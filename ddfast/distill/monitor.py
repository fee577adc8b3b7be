"""What a generator's samples look like while it trains: likelihood, diversity, and how far its average has got."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ddfast import seeds
from ddfast.distill.method import Call, ExponentialMovingAverage, directly
from ddfast.frechet import frechet_distance
from ddfast.models.flow_network import FlowNetwork
from ddfast.models.protocol import Teacher
from ddfast.ops import nearest_code, noise

_SAMPLES, _DIRECTIONS, _SEED = 256, 16, 20_251_021
_LEAST_DIVERSITY = 0.5
_LARGEST_DISTANCE = 1.0


class Watcher:
    """Looks at a fixed batch of samples of the live and of the averaged weights.

    Args:
        student: the generator.
        teacher: judges its samples, and gives those that diversity is measured against.
    """

    def __init__(self, student: FlowNetwork, teacher: Teacher) -> None:
        self.student, self.teacher = student, teacher
        device = teacher.codebook.device
        index = torch.arange(_SAMPLES, dtype=torch.int64)
        shape = (teacher.num_tokens, teacher.code_dim)
        self.noise = noise(_SEED, index, shape, device)
        self.condition = teacher.condition_of((index % max(teacher.num_conditions, 1)).to(device))
        flat = teacher.num_tokens * teacher.code_dim
        self.directions = noise(_SEED + 1, torch.arange(_DIRECTIONS, dtype=torch.int64), (flat,), device).T / flat**0.5
        self.reference: Tensor | None = None

    @torch.no_grad()
    def look(self, average: ExponentialMovingAverage, call: Call = directly) -> tuple[dict[str, float], str | None]:
        """Figures of the samples, and what is alarming about them, if anything; networks are called by `call`.

        - teacher_nll: nats per token of the live samples under the teacher, unfiltered.
        - diversity: entropy of the codes at every position, as a share of the teacher's own samples'.
        - ema_distance: Fréchet distance of averaged and live samples in 16 fixed random directions, as a share of the
          teacher's samples' variance there.
        """
        teacher, student = self.teacher, self.student
        if self.reference is None:
            generator = seeds.generator(_SEED, teacher.codebook.device)
            self.reference = call(partial(teacher.generate, generator=generator), self.condition)
        live = call(student.generate, self.condition, self.noise)[0]
        with average.applied_to(student):
            averaged = call(student.generate, self.condition, self.noise)[0]
        codes = nearest_code(live, student.codebook)
        log_probs = call(partial(teacher.log_probs, filtered=False), self.condition, codes).gather(-1, codes[..., None])
        spread = float(self._features(teacher.embed(self.reference)).var(0).sum())
        seen = {
            "teacher_nll": -float(log_probs.mean()),
            "diversity": _entropy(codes, teacher.num_codes) / _entropy(self.reference, teacher.num_codes),
            "ema_distance": frechet_distance(self._features(live), self._features(averaged)) / spread,
        }
        return seen, _alarm(seen)

    def _features(self, tokens: Tensor) -> Tensor:
        return tokens.flatten(1) @ self.directions


def _alarm(seen: dict[str, float]) -> str | None:
    if seen["diversity"] < _LEAST_DIVERSITY:
        return (
            f"the samples' diversity collapsed to {seen['diversity']:.0%} of the teacher's: "
            "lower the generator's learning rate, or raise anchor_weight or guidance_updates"
        )
    if not seen["ema_distance"] < _LARGEST_DISTANCE:
        return (
            f"live and averaged weights make different samples (distance {seen['ema_distance']:.2f} of the teacher's "
            "variance), the training diverges: lower the generator's learning rate"
        )
    return None


def _entropy(codes: Tensor, num_codes: int) -> float:
    """Mean over positions of the entropy, in nats, of codes int64 [B, N]."""
    table = torch.zeros(codes.shape[1], num_codes, dtype=torch.float32, device=codes.device)
    table.scatter_add_(1, codes.T, table.new_full(codes.T.shape, 1 / len(codes)))
    return max(float(torch.special.entr(table).sum(-1).mean()), 1e-6)

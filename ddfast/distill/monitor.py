"""What a generator's samples look like while it trains: likelihood, diversity, and how far its average has got."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ddfast import processes, seeds
from ddfast.distill.method import Call, ExponentialMovingAverage, directly
from ddfast.frechet import Gaussian, frechet_distance
from ddfast.models.autoregressive import Condition, take
from ddfast.models.flow_network import FlowNetwork
from ddfast.models.protocol import Teacher
from ddfast.ops import nearest_code, noise

_SAMPLES, _AT_A_TIME, _DIRECTIONS, _SEED = 256, 32, 16, 20_251_021
_TOKENS = _AT_A_TIME * 680
"""At a time: so many samples of VAR at 256 pixels, and fewer of longer sequences, whose caches would take what training
has left (VAR-d36 at 512 pixels: 3 GiB a sample). By their length alone: all processes do as many calls."""
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
            shape = (_SAMPLES, teacher.num_tokens)
            uniform = torch.rand(shape, generator=generator, dtype=torch.float32, device=generator.device)
            self.reference = self._by_chunks(
                lambda rows: call(partial(teacher.generate, uniform=uniform[rows], graph=False), self._condition(rows))
            )
        live = self._samples(call)
        with average.applied_to(student):
            averaged = self._samples(call)
        codes = nearest_code(live, student.codebook)

        def likelihoods(rows: Tensor) -> Tensor:
            log_probs = call(partial(teacher.log_probs, filtered=False), self._condition(rows), codes[rows])
            return log_probs.gather(-1, codes[rows][..., None])

        log_probs = self._by_chunks(likelihoods)
        spread = float(self._features(teacher.embed(self.reference)).var(0).sum())
        distance = frechet_distance(*(Gaussian.of(self._features(tokens)) for tokens in (live, averaged)))
        seen = {
            "teacher_nll": -float(log_probs.mean()),
            "diversity": _entropy(codes, teacher.num_codes) / _entropy(self.reference, teacher.num_codes),
            "ema_distance": distance / spread,
        }
        return seen, _alarm(seen)

    def _samples(self, call: Call) -> Tensor:
        return self._by_chunks(lambda rows: call(self.student.generate, self._condition(rows), self.noise[rows])[0])

    def _condition(self, rows: Tensor) -> Condition:
        return take(self.condition, rows)

    def _by_chunks(self, make: Callable[[Tensor], Tensor]) -> Tensor:
        """What is made of all samples, a few at a time: a teacher's cache of all may be larger than the memory."""
        index, made = torch.arange(_SAMPLES, dtype=torch.int64, device=self.noise.device), []
        for rows in index.split(min(max(_TOKENS // self.teacher.num_tokens, 1), _AT_A_TIME)):
            made.append(make(rows))
            processes.sign()
        return torch.cat(made)

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

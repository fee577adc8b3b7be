"""A teacher small enough to enumerate: every total variation can be computed exactly."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddfast import seeds
from ddfast.models.autoregressive import Condition, SamplingDefaults
from ddfast.models.protocol import Teacher


@dataclass
class ToyState:
    """Codes decided so far."""

    codes: Tensor
    unconditional: Tensor = field(repr=False)


class ToyTeacher(Teacher):
    """Pairwise AR tables over codes on a circle: logits of token i are `bias_i + sum_{k<i} table_{ik}[q_k]`.

    Strongly dependent, one class, joint distribution by enumeration;
    docs/method.md section 17 (The enumerable teacher).

    Args:
        num_codes: codes, spread over a circle in R^2 (the inner ring holds every second one).
        num_tokens: tokens.
        strength: standard deviation of the tables' entries; larger means more dependent.
        seed: of the tables.
    """

    def __init__(self, *, num_codes: int = 8, num_tokens: int = 4, strength: float = 1.5, seed: int = 0) -> None:
        super().__init__()
        angle = torch.arange(num_codes, dtype=torch.float32) * (2 * torch.pi / num_codes)
        self.register_buffer("codebook", torch.stack((angle.cos(), angle.sin()), dim=1))
        self.groups, self.num_classes, self.defaults = (1,) * num_tokens, 1, SamplingDefaults()
        generator = seeds.generator(seed)
        self.register_buffer("bias", 0.5 * torch.randn(num_tokens, num_codes, generator=generator, dtype=torch.float32))
        tables = torch.randn(num_tokens, num_tokens, num_codes, num_codes, generator=generator, dtype=torch.float32)
        self.register_buffer("tables", strength * tables)  # [token, earlier token, its code, V]
        self.bias: Tensor
        self.tables: Tensor

    def begin(self, condition: Condition, *, guided: bool) -> ToyState:
        if guided:
            raise ValueError("cfg_scale: the toy teacher has one class and no guidance, expected 1.0")
        assert isinstance(condition, Tensor)
        return ToyState(condition.new_empty(len(condition), 0), condition)

    def advance(self, state: ToyState, codes: Tensor) -> Tensor:
        state.codes = torch.cat((state.codes, codes), dim=1)
        return self._token_logits(state.codes, state.codes.shape[1])[:, None]

    def logits(self, condition: Condition, codes: Tensor, *, unconditional: bool = False) -> Tensor:
        self.check_training_condition(condition)
        if codes.is_floating_point():
            codes = torch.cdist(codes, self.codebook).argmin(-1)
        return torch.stack([self._token_logits(codes, token) for token in range(self.num_tokens)], dim=1)

    def _token_logits(self, codes: Tensor, token: int) -> Tensor:
        logits = self.bias[token].expand(len(codes), -1)
        for earlier in range(token):
            logits = logits + self.tables[token, earlier][codes[:, earlier]]
        return logits

    def all_sequences(self) -> Tensor:
        """Every sequence, int64 [V^n, n], the first token changing slowest."""
        digits = torch.arange(self.num_codes, dtype=torch.int64).expand(self.num_tokens, -1)
        return torch.cartesian_prod(*digits).view(-1, self.num_tokens)

    def joint(self) -> Tensor:
        """Exact probabilities of `all_sequences()`, float64 [V^n]."""
        sequences = self.all_sequences()
        log_probs = self.logits(torch.zeros(len(sequences), dtype=torch.int64), sequences).double().log_softmax(-1)
        return log_probs.gather(-1, sequences[..., None]).sum((1, 2)).exp()

    def total_variation(self, codes: Tensor) -> float:
        """Total variation between the empirical distribution of int64 [B, n] codes and the exact joint."""
        weights = self.num_codes ** torch.arange(self.num_tokens - 1, -1, -1, dtype=torch.int64)
        counts = torch.bincount((codes * weights).sum(-1), minlength=self.num_codes**self.num_tokens)
        return 0.5 * float((counts.double() / len(codes) - self.joint()).abs().sum())

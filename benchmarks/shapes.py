"""The papers' shapes and sampling settings, with inputs that resemble a teacher's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Tokens, codebook and filters of one teacher's step."""

    name: str
    tokens: int
    num_codes: int
    dim: int
    filters: dict[str, float]
    unit_sphere: bool = False

    def codebook(self) -> Tensor:
        """Codes [V, d]: on the unit sphere (LlamaGen) or N(0, 0.5^2) (VAR)."""
        codes = torch.randn(self.num_codes, self.dim, generator=torch.Generator().manual_seed(0))
        return F.normalize(codes, dim=-1) if self.unit_sphere else 0.5 * codes

    def logits(self, codebook: Tensor, *, std: float = 2.5) -> Tensor:
        """Logits [tokens, V]: half smooth over the codebook, as neighbouring codes are alike, half noise."""
        generator = torch.Generator().manual_seed(1)
        smooth = torch.randn(self.tokens, self.dim, generator=generator) @ codebook.T
        rough = torch.randn(self.tokens, self.num_codes, generator=generator)
        return std * (smooth / smooth.std(-1, keepdim=True) + rough) / 2**0.5

    def noise(self) -> Tensor:
        """Standard normal [tokens, d]."""
        return torch.randn(self.tokens, self.dim, generator=torch.Generator().manual_seed(2))


LLAMAGEN = Shape(name="llamagen", tokens=64, num_codes=16384, dim=8, filters={"top_k": 8000}, unit_sphere=True)
VAR = Shape(name="var", tokens=256, num_codes=4096, dim=32, filters={"top_k": 900, "top_p": 0.95})
SHAPES = [LLAMAGEN, VAR]

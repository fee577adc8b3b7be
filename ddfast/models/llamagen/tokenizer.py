"""LlamaGen's image tokenizer, in the parameter layout of the official files.

Dimensions: B batch, N tokens, V codes, D code dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ddfast.models.inputs import as_embeddings
from ddfast.models.layers import weights_dtype
from ddfast.models.tokenizers import ImageTokenizer
from ddfast.models.vqgan import LLAMAGEN_NAMING, ConvSizes
from ddfast.ops.nearest_code import nearest_code


class LlamaGenTokenizer(ImageTokenizer):
    """LlamaGen's VQ-8 and VQ-16: one code per latent pixel, latents and codes normalised where they are compared.

    Args:
        num_codes, code_dim: V and D.
        sizes: of encoder and decoder.
        codebook_l2_norm: normalise codes and latents.
        usage_slots: length of the statistics buffer that official files carry; 0: none.

    Source: Sun et al. 2024, arXiv 2406.06525.
    """

    def __init__(
        self,
        *,
        num_codes: int = 16384,
        code_dim: int = 8,
        sizes: ConvSizes | None = None,
        codebook_l2_norm: bool = True,
        usage_slots: int = 65536,
    ) -> None:
        super().__init__(sizes or ConvSizes(), LLAMAGEN_NAMING, num_codes=num_codes, code_dim=code_dim, kernel=1)
        self.codebook_l2_norm = codebook_l2_norm
        if usage_slots:
            self.quantize.register_buffer("codebook_used", torch.zeros(usage_slots, dtype=torch.float32))

    @property
    def config(self) -> dict[str, Any]:
        return {"codebook_l2_norm": self.codebook_l2_norm}

    def codebook(self) -> Tensor:
        weight = self.quantize.embedding.weight.detach().float()
        return F.normalize(weight, dim=-1) if self.codebook_l2_norm else weight

    def codes_of(self, latents: Tensor) -> Tensor:
        height, width = latents.shape[-2:]
        if height != width:  # `decode` could not tell it from another shape of as many codes
            factor = self.downsampling
            raise ValueError(f"images: got {height * factor} x {width * factor} pixels, expected square ones")
        return self.quantise(rearrange(latents, "b d h w -> b (h w) d"))[0]

    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, N, D] to codes int64 [B, N] and their embeddings [B, N, D]."""
        if self.codebook_l2_norm:
            latents = F.normalize(latents, dim=-1)
        codebook = self.codebook()
        codes = nearest_code(latents.contiguous(), codebook)
        return codes, codebook[codes]

    def decode(self, embeddings: Any) -> Tensor:
        count = embeddings.shape[1] if getattr(embeddings, "ndim", 0) > 1 else 0
        side = math.isqrt(count)
        if side * side != count:
            raise ValueError(f"codes: got {count} a row, expected those of a square image: a square number")
        embeddings = as_embeddings(embeddings, self.codebook(), (None, count))
        with weights_dtype(embeddings):
            return self.decode_latents(rearrange(embeddings, "b (h w) d -> b d h w", h=side))

"""The digits' VQ tokenizer, and its training.

Dimensions: B batch, N tokens, D code dimension.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from ddfast import seeds
from ddfast.config import DigitsTokenizerConfig
from ddfast.models.digits.data import CANVAS
from ddfast.models.digits.training import Quantising, Rounded, fit_tokenizer
from ddfast.models.layers import Conv2d, weights_dtype
from ddfast.ops.nearest_code import nearest_code
from ddfast.progress import Progress

PATCH = 4


class Tokenizer(nn.Module):
    """VQ autoencoder: 16x16 images to a 4x4 grid of codes (raster order) and back."""

    def __init__(self, config: DigitsTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        width, dim = config.width, config.code_dim
        self.encoder = nn.Sequential(
            Conv2d(1, width, PATCH, stride=PATCH),
            nn.GELU(),
            Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            Conv2d(width, dim, 1),
        )
        self.decoder = nn.Sequential(
            Conv2d(dim, 2 * width, 3, padding=1),
            nn.GELU(),
            Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GELU(),
            Conv2d(2 * width, PATCH * PATCH * 4, 1),
            nn.PixelShuffle(PATCH),
            nn.GELU(),
            Conv2d(4, 1, 3, padding=1),
        )
        self.register_buffer("codebook", torch.randn(config.num_codes, dim, dtype=torch.float32))
        self.codebook: Tensor

    @property
    def num_tokens(self) -> int:
        return (CANVAS // PATCH) ** 2

    def latents(self, images: Tensor) -> Tensor:
        """Unquantised latents [B, N, D] of images [B, 1, 16, 16] in [0, 1]."""
        return rearrange(self.encoder(2 * images - 1), "b d h w -> b (h w) d")

    def encode(self, images: Tensor) -> Tensor:
        """Codes int64 [B, N]."""
        with weights_dtype(images):
            return nearest_code(self.latents(images), self.codebook)

    def decode(self, embeddings: Tensor) -> Tensor:
        """Raw images [B, 1, 16, 16] in [-1, 1] scale from embeddings [B, N, D]."""
        side = CANVAS // PATCH
        with weights_dtype(embeddings):
            return self.decoder(rearrange(embeddings, "b (h w) d -> b d h w", h=side))


def train_tokenizer(config: DigitsTokenizerConfig, *, seed: int = 0, progress: Progress | None = None) -> Tokenizer:
    """Train the tokenizer on rendered training digits; see `fit_tokenizer`."""
    seeds.seed_all(seed)
    model = Tokenizer(config)
    parts = Quantising(
        latents=model.latents,
        rounded=lambda latents, rounding: Rounded.of(latents, model.codebook, rounding),
        decode=model.decode,
        codebook=model.codebook,
    )
    return fit_tokenizer(model, parts, config, seed=seed, progress=progress)

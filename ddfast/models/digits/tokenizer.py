"""The digits' VQ tokenizer, and its training.

Dimensions: B batch, N tokens, D code dimension.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ddfast import seeds
from ddfast.config import DigitsTokenizerConfig
from ddfast.models.digits.data import CANVAS, digit_images, render
from ddfast.models.layers import Conv2d, weights_dtype
from ddfast.ops.nearest_code import nearest_code
from ddfast.progress import Progress
from ddfast.schedule import warmup_cosine

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
    """Train the tokenizer on rendered training digits: L1 + L2 reconstruction, EMA codebook, dead codes redrawn."""
    seeds.seed_all(seed)
    model = Tokenizer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(warmup_cosine, total=config.iterations, warmup=config.iterations // 20)
    )
    generator = seeds.generator(seed, number=1)
    originals, _ = digit_images("train")
    counts, sums = torch.ones(config.num_codes, dtype=torch.float32), model.codebook.clone()
    for step in range(config.iterations):
        rows = torch.randint(len(originals), (config.batch_size,), generator=generator, dtype=torch.int64)
        images = render(originals[rows], generator)
        latents = model.latents(images)
        flat = latents.detach().flatten(0, 1)
        if step < config.warmup:  # a plain autoencoder first: its latents then seed the codebook
            embeddings, commitment = latents, latents.square().mean() * 1e-3
        else:
            if step == config.warmup:
                order = torch.randperm(len(flat), generator=generator, dtype=torch.int64)
                sums = flat[order[: config.num_codes]].clone()
                model.codebook.copy_(sums)
            codes = nearest_code(latents.detach(), model.codebook)
            chosen = model.codebook[codes]
            embeddings = latents + (chosen - latents).detach()
            commitment = 0.25 * F.mse_loss(latents, chosen)
            one_hot = F.one_hot(codes.flatten(), config.num_codes).float()
            counts.mul_(0.98).add_(one_hot.sum(0), alpha=0.02)
            sums.mul_(0.98).add_(one_hot.T @ flat, alpha=0.02)
            dead = counts < 0.5
            if step % 20 == 0 and step < 0.7 * config.iterations and dead.any():
                rows = torch.randint(len(flat), (int(dead.sum()),), generator=generator, dtype=torch.int64)
                counts[dead], sums[dead] = 1.0, flat[rows]
            model.codebook.copy_(sums / counts[:, None].clamp_min(1e-3))
        error = model.decode(embeddings) - (2 * images - 1)
        loss = error.abs().mean() + error.square().mean() + commitment
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1, config.iterations, f"loss {loss.item():.4f}")
    return model.eval()

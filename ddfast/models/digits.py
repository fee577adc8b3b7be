"""The embedded task: scikit-learn's handwritten digits on a larger canvas, a VQ tokenizer and an AR teacher for them.

The 1,797 real 8x8 images are enlarged and placed at random positions and sizes on a 16x16 canvas, light on dark or
dark on light. Size, place and polarity are properties of the whole image, so its tokens depend strongly on each other
even when the class is known: a model that draws every token independently mixes polarities and tears strokes apart.
That is what makes this small task tell one-step generators apart.

Dimensions: B batch, N tokens, V codes, D code dimension, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ddfast import seeds
from ddfast.config import DigitsTeacherConfig, DigitsTokenizerConfig, TrainConfig, config_hash
from ddfast.env import cache_dir
from ddfast.errors import DDFastError
from ddfast.models.checkpoint import load_state, load_tensors, save_tensors
from ddfast.models.inputs import as_images, check_size
from ddfast.models.layers import Conv2d, weights_dtype
from ddfast.models.protocol import SamplingDefaults
from ddfast.models.transformer import TransformerTeacher
from ddfast.ops import nearest_code
from ddfast.schedule import warmup_cosine

CANVAS = 16
PATCH = 4
NUM_CLASSES = 10
HELD_OUT = 300

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, text)` after every step."""


@lru_cache(maxsize=2)
def digit_images(split: str) -> tuple[Tensor, Tensor]:
    """The original digits of one split: images float32 [B, 1, 8, 8] in [0, 1] and labels int64 [B].

    The split is fixed: 300 held-out images ("test"), the other 1,497 for training ("train").
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: got {split!r}, expected 'train' or 'test'")
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.images), generator=seeds.generator(0), dtype=torch.int64)
    rows = order[:HELD_OUT] if split == "test" else order[HELD_OUT:]
    images = torch.from_numpy(data.images).float()[rows, None] / 16
    return images, torch.from_numpy(data.target).long()[rows]


def render(images: Tensor, generator: torch.Generator) -> Tensor:
    """Place 8x8 digits [B, 1, 8, 8] on the canvas: [B, 1, 16, 16] in [0, 1], random place, size and polarity."""
    batch = len(images)
    size = torch.empty(batch, dtype=torch.float32).uniform_(0.65, 0.9, generator=generator)
    room = (1 - size)[:, None]
    shift = torch.empty(batch, 2, dtype=torch.float32).uniform_(-1, 1, generator=generator) * room
    dark_on_light = torch.rand(batch, generator=generator, dtype=torch.float32) < 0.5
    # grid_sample reads: canvas coordinate y in [-1, 1] comes from (y - shift) / size of the digit's own coordinates.
    transform = torch.zeros(batch, 2, 3, dtype=torch.float32)
    transform[:, 0, 0] = transform[:, 1, 1] = 1 / size
    transform[:, :, 2] = -shift / size[:, None]
    grid = F.affine_grid(transform, [batch, 1, CANVAS, CANVAS], align_corners=False)
    canvas = F.grid_sample(images, grid, mode="bicubic", align_corners=False).clamp(0, 1)
    return torch.where(dark_on_light[:, None, None, None], 1 - canvas, canvas)


def digit_batch(split: str, count: int, seed: int, *, number: int = 0) -> tuple[Tensor, Tensor]:
    """`count` rendered digits of a split, drawn with replacement: images [count, 1, 16, 16] and labels [count].

    Seed and number are those of `ddfast.seeds.generator`.
    """
    images, labels = digit_images(split)
    generator = seeds.generator(seed, number=number)
    rows = torch.randint(len(images), (count,), generator=generator, dtype=torch.int64)
    return render(images[rows], generator), labels[rows]


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


class DigitsTeacher(TransformerTeacher):
    """Class-conditional AR transformer over the tokenizer's codes."""

    def __init__(self, tokenizer: Tokenizer, config: DigitsTeacherConfig) -> None:
        super().__init__(
            codebook=tokenizer.codebook,
            groups=(1,) * tokenizer.num_tokens,
            num_classes=NUM_CLASSES,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            defaults=SamplingDefaults(
                cfg_scale=config.cfg_scale, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
            ),
        )
        self.config = config
        self.tokenizer = tokenizer.requires_grad_(False)

    def encode(self, images: Any) -> Tensor:
        images = as_images(images, 1, low=0.0, device=self.codebook.device)
        check_size(images, CANVAS, CANVAS)
        return self.tokenizer.encode(images)

    def decode(self, codes: Any, *, clamp: bool = True) -> Tensor:
        images = self.tokenizer.decode(self.tokens(codes))
        return ((images + 1) / 2).clamp(0, 1) if clamp else images


def train_teacher(
    tokenizer: Tokenizer, config: DigitsTeacherConfig, *, seed: int = 0, progress: Progress | None = None
) -> DigitsTeacher:
    """Train the AR teacher by next-token cross-entropy with class dropout (for guidance)."""
    seeds.seed_all(seed)
    teacher = DigitsTeacher(tokenizer, config)
    parameters = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(warmup_cosine, total=config.iterations, warmup=config.iterations // 20)
    )
    images, labels = digit_batch("train", config.training_images, seed, number=1)
    with torch.no_grad():
        codes = torch.cat([teacher.encode(chunk) for chunk in images.split(4096)])
    generator = seeds.generator(seed, number=2)
    for step in range(config.iterations):
        rows = torch.randint(len(codes), (config.batch_size,), generator=generator, dtype=torch.int64)
        dropped = torch.rand(config.batch_size, generator=generator, dtype=torch.float32) < config.class_dropout
        condition = torch.where(dropped, NUM_CLASSES, labels[rows])
        # Not by `logits`, which takes no dropped labels.
        logits = teacher.head(teacher.hidden(condition, teacher.codebook[codes[rows]]))
        loss = F.cross_entropy(logits.flatten(0, 1), codes[rows].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1, config.iterations, f"loss {loss.item():.4f}")
    return teacher.eval().requires_grad_(False)


def load_or_train(config: TrainConfig, progress: Progress | None = None) -> DigitsTeacher:
    """The digits teacher of these settings: from the cache, or trained now (about two minutes) and cached.

    Args:
        config: its `tokenizer`, `teacher` and `seed` decide which teacher it is.
        progress: called as progress(done, total, text) while training.
    """
    path = cache_dir() / f"digits-teacher-{config_hash(config.tokenizer, config.teacher, config.seed)}.safetensors"
    if not path.exists():
        assert isinstance(config.tokenizer, DigitsTokenizerConfig)
        assert isinstance(config.teacher, DigitsTeacherConfig)
        tokenizer = train_tokenizer(config.tokenizer, seed=config.seed, progress=progress)
        teacher = train_teacher(tokenizer, config.teacher, seed=config.seed, progress=progress)
        save_teacher(teacher, path)
    return load_digits_teacher(path).to(config.device)


def save_teacher(teacher: DigitsTeacher, path: Path) -> None:
    """Write a teacher with its tokenizer and settings to one safetensors file."""
    settings = {
        "tokenizer": dataclasses.asdict(teacher.tokenizer.config),
        "teacher": dataclasses.asdict(teacher.config),
    }
    save_tensors(path, teacher.state_dict(), {"family": "digits", **settings})


def load_digits_teacher(path: Path) -> DigitsTeacher:
    """Read what `save_teacher` wrote."""
    tensors, header = load_tensors(path)
    if header.get("family") != "digits":
        raise DDFastError(f"{path} is not a digits teacher (family {header.get('family')!r})")
    teacher = untrained_digits_teacher(
        DigitsTokenizerConfig(**header["tokenizer"]), DigitsTeacherConfig(**header["teacher"])
    )
    load_state(teacher, tensors, path)
    return teacher


def untrained_digits_teacher(tokenizer: DigitsTokenizerConfig, teacher: DigitsTeacherConfig) -> DigitsTeacher:
    """A teacher with random weights: for profiling, and to load weights into."""
    return DigitsTeacher(Tokenizer(tokenizer), teacher).eval().requires_grad_(False)

"""How a tokenizer and a teacher learn the digits: the loops that all families of the digits share.

Dimensions: B batch, N tokens, V codes, D code dimension, M vectors of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast import seeds
from ddfast.config import DigitsTeacherConfig, DigitsTokenizerConfig
from ddfast.models.digits.data import NUM_CLASSES, digit_batch, digit_images, render
from ddfast.models.protocol import Teacher
from ddfast.ops.nearest_code import nearest_code
from ddfast.optimizers import fit, optimizers
from ddfast.progress import Progress
from ddfast.schedule import warmup_cosine

Model = TypeVar("Model", bound=nn.Module)
Trainee = TypeVar("Trainee", bound=Teacher)


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """Latents and the codes that take their place, while a tokenizer learns.

    Attributes:
        latents: what the decoder reads; their gradient is that of the latents before.
        vectors: float32 [M, D], what was compared with the codebook, without gradient.
        codes: int64 [M], the code of each; none in the warm-up.
        loss: what keeps latents near their codes; in the warm-up, near 0.
    """

    latents: Tensor
    vectors: Tensor
    codes: Tensor
    loss: Tensor

    @classmethod
    def of(cls, latents: Tensor, codebook: Tensor, rounding: bool) -> Rounded:
        """One code for each of the latents [B, N, D]."""
        vectors = latents.detach().flatten(0, 1)
        if not rounding:
            return cls.warm_up(latents, vectors)
        codes = nearest_code(latents.detach(), codebook)
        chosen = codebook[codes]
        return cls(
            latents=latents + (chosen - latents).detach(),
            vectors=vectors,
            codes=codes.flatten(),
            loss=0.25 * F.mse_loss(latents, chosen),
        )

    @classmethod
    def warm_up(cls, latents: Tensor, vectors: Tensor) -> Rounded:
        """Latents as they are."""
        none = torch.empty(0, dtype=torch.int64)
        return cls(latents=latents, vectors=vectors, codes=none, loss=latents.square().mean() * 1e-3)


@dataclass(frozen=True, kw_only=True)
class Quantising:
    """A tokenizer as its training calls it.

    Attributes:
        latents: of images float32 [B, 1, 16, 16] in [0, 1], in the tokenizer's own shape.
        rounded: these with their codes; the flag is False in the warm-up, where there are none yet.
        decode: latents to raw images [B, C, 16, 16], about [-1, 1].
        codebook: float32 [V, D], written in place.
    """

    latents: Callable[[Tensor], Tensor]
    rounded: Callable[[Tensor, bool], Rounded]
    decode: Callable[[Tensor], Tensor]
    codebook: Tensor


def fit_tokenizer(
    model: Model, parts: Quantising, config: DigitsTokenizerConfig, *, seed: int = 0, progress: Progress | None = None
) -> Model:
    """Train a tokenizer on rendered training digits: L1 + L2 reconstruction, EMA codebook, dead codes redrawn.

    Args:
        model: whose parameters learn; those without gradient, such as a codebook, stay.
        parts: its functions.
        config: of the training.
        seed: of the images; the caller draws the weights.
        progress: called after every step.
    """
    codebook = parts.codebook
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(warmup_cosine, total=config.iterations, warmup=config.iterations // 20)
    )
    generator = seeds.generator(seed, number=1)
    originals, _ = digit_images("train")
    counts, sums = torch.ones(config.num_codes, dtype=torch.float32), codebook.clone()
    for step in range(config.iterations):
        rows = torch.randint(len(originals), (config.batch_size,), generator=generator, dtype=torch.int64)
        images = render(originals[rows], generator)
        latents = parts.latents(images)
        if step == config.warmup:  # a plain autoencoder until here: its latents seed the codebook
            vectors = parts.rounded(latents, False).vectors
            order = torch.randperm(len(vectors), generator=generator, dtype=torch.int64)
            sums = vectors[order[: config.num_codes]].clone()
            codebook.copy_(sums)
        made = parts.rounded(latents, step >= config.warmup)
        if step >= config.warmup:
            one_hot = F.one_hot(made.codes, config.num_codes).float()
            counts.mul_(0.98).add_(one_hot.sum(0), alpha=0.02)
            sums.mul_(0.98).add_(one_hot.T @ made.vectors, alpha=0.02)
            dead = counts < 0.5
            if step % 20 == 0 and step < 0.7 * config.iterations and dead.any():
                rows = torch.randint(len(made.vectors), (int(dead.sum()),), generator=generator, dtype=torch.int64)
                counts[dead], sums[dead] = 1.0, made.vectors[rows]
            codebook.copy_(sums / counts[:, None].clamp_min(1e-3))
        error = parts.decode(made.latents) - (2 * images - 1)
        loss = error.abs().mean() + error.square().mean() + made.loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1, config.iterations, f"loss {loss.item():.4f}")
    return model.eval()


def fit_teacher(
    teacher: Trainee,
    logits: Callable[[Tensor, Tensor], Tensor],
    config: DigitsTeacherConfig,
    *,
    channels: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Trainee:
    """Train an AR teacher by cross-entropy of the tokens, given those before, with class dropout (for guidance).

    Args:
        teacher: whose parameters learn, but for those that take no gradient.
        logits: [B, N, V], teacher-forced, of labels int64 [B] and codes int64 [B, N]. The label `NUM_CLASSES` is "no
            condition": so it is not the teacher's own `logits`, which takes no dropped labels.
        config: of the training.
        channels: of the images that the teacher encodes.
        seed: of the images and the batches; the caller draws the weights.
        progress: called after every step.
    """
    betas = (0.9, 0.999 if config.optimizer == "adamw" else 0.95)  # alone, as always: a teacher of before is made again
    trained = optimizers(teacher, config.optimizer, weight_decay=config.weight_decay, betas=betas)
    images, labels = digit_batch("train", config.training_images, seed, number=1)
    with torch.no_grad():
        chunks = images.expand(-1, channels, -1, -1).split(4096)
        codes = torch.cat([teacher.encode(chunk) for chunk in chunks])
    generator = seeds.generator(seed, number=2)

    def loss() -> Tensor:
        rows = torch.randint(len(codes), (config.batch_size,), generator=generator, dtype=torch.int64)
        dropped = torch.rand(config.batch_size, generator=generator, dtype=torch.float32) < config.class_dropout
        condition = torch.where(dropped, NUM_CLASSES, labels[rows])
        return F.cross_entropy(logits(condition, codes[rows]).flatten(0, 1), codes[rows].flatten())

    fit(trained, loss, iterations=config.iterations, learning_rate=config.learning_rate, progress=progress)
    return teacher.eval().requires_grad_(False)

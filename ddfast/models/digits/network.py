"""The digits' AR teacher, and its training.

Dimensions: B batch, N tokens, D code dimension.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast import seeds
from ddfast.config import DigitsTeacherConfig
from ddfast.models.autoregressive import SamplingDefaults
from ddfast.models.digits.data import CANVAS, NUM_CLASSES, digit_batch
from ddfast.models.digits.tokenizer import Tokenizer
from ddfast.models.inputs import as_images, check_size
from ddfast.models.transformer import TransformerTeacher
from ddfast.progress import Progress
from ddfast.schedule import warmup_cosine


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

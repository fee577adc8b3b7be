"""The digits' AR teacher, and its training.

Dimensions: B batch, N tokens, D code dimension.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ddfast import seeds
from ddfast.config import DigitsTeacherConfig
from ddfast.models.autoregressive import SamplingDefaults
from ddfast.models.digits.data import CANVAS, NUM_CLASSES
from ddfast.models.digits.tokenizer import Tokenizer
from ddfast.models.digits.training import fit_teacher
from ddfast.models.inputs import as_images, check_size
from ddfast.models.transformer import TransformerTeacher
from ddfast.progress import Progress


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
    """Train the AR teacher over the tokenizer's codes; see `fit_teacher`."""
    seeds.seed_all(seed)
    teacher = DigitsTeacher(tokenizer, config)

    def logits(labels: Tensor, codes: Tensor) -> Tensor:
        return teacher.head(teacher.hidden(labels, teacher.codebook[codes]))

    return fit_teacher(teacher, logits, config, seed=seed, progress=progress)

"""The AR teacher of text, and its training.

Dimensions: B batch, N tokens, V codes, D code dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast import seeds
from ddfast.config import TextTeacherConfig, TextTokenizerConfig
from ddfast.models.autoregressive import Condition, SamplingDefaults
from ddfast.models.inputs import as_codes as checked
from ddfast.models.text.data import windows
from ddfast.models.text.tokenizer import as_codes, as_texts
from ddfast.models.transformer import TransformerTeacher
from ddfast.ops import nearest_code
from ddfast.optimizers import fit, optimizers
from ddfast.progress import Progress


class TextTeacher(TransformerTeacher):
    """AR transformer over characters. It has one class, all there is, and so nothing to guide it by."""

    def __init__(self, tokenizer: TextTokenizerConfig, config: TextTeacherConfig) -> None:
        super().__init__(
            codebook=on_sphere(torch.randn(tokenizer.num_codes, tokenizer.code_dim, dtype=torch.float32)),
            groups=(1,) * config.num_tokens,
            num_classes=1,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            defaults=SamplingDefaults(**config.sampling()),
        )
        self.config = config

    def labels(self, condition: Condition, *, unconditional: bool = False) -> Tensor:
        """The labels; raise `ValueError` where guidance asks for none."""
        if unconditional:
            raise ValueError("cfg_scale: a teacher of text has no condition to guide it by, expected 1.0")
        return super().labels(condition)

    def codes_of(self, texts: Sequence[str]) -> Tensor:
        """Codes int64 [B, N] of texts of `num_tokens` characters; errors as of `tokenizer.as_codes`."""
        return checked(as_codes(texts), self.num_codes, (len(texts), self.num_tokens), "texts")

    def texts(self, codes: Any) -> list[str]:
        """As `Teacher.texts`."""
        tokens = self.tokens(codes)
        return as_texts(nearest_code(tokens, self.codebook))


def on_sphere(vectors: Tensor) -> Tensor:
    """Codes [V, D] of length sqrt(D): of the noise's own size, and none of them nearer to it than others."""
    return F.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5


class _Learner(nn.Module):
    """A teacher and the vectors that its codebook is made of: they learn with it."""

    def __init__(self, teacher: TextTeacher) -> None:
        super().__init__()
        self.teacher, self.vectors = teacher, nn.Parameter(teacher.codebook.clone())

    def loss(self, codes: Tensor) -> Tensor:
        """Cross-entropy of the tokens [B, N], given those before."""
        label = torch.zeros(len(codes), dtype=torch.int64)
        hidden = self.teacher.hidden(label, on_sphere(self.vectors)[codes])
        return F.cross_entropy(self.teacher.head(hidden).flatten(0, 1), codes.flatten())


def train_teacher(
    tokenizer: TextTokenizerConfig, config: TextTeacherConfig, *, seed: int = 0, progress: Progress | None = None
) -> TextTeacher:
    """Train a teacher and its codebook on windows of the training text."""
    seeds.seed_all(seed)
    teacher = TextTeacher(tokenizer, config)
    learner, generator = _Learner(teacher), seeds.generator(seed, number=2)
    fit(
        optimizers(learner, config.optimizer, weight_decay=config.weight_decay),
        lambda: learner.loss(windows("train", config.batch_size, config.num_tokens, generator)),
        iterations=config.iterations,
        learning_rate=config.learning_rate,
        progress=progress,
    )
    teacher.codebook.copy_(on_sphere(learner.vectors.detach()))
    return teacher.eval().requires_grad_(False)

"""A small classifier of rendered digits: its features are the space in which the Fréchet distance is taken."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast import seeds
from ddfast.env import cache_dir
from ddfast.models.checkpoint import cached, load_state, load_tensors, save_tensors
from ddfast.models.digits.data import NUM_CLASSES, digit_images, render
from ddfast.models.layers import Conv2d, Linear
from ddfast.progress import Progress
from ddfast.schedule import warmup_cosine

_ITERATIONS = 1200
_FEATURES = 48
_VERSION = 1
"""Raised whenever the training below changes, so that a cached classifier of before is not used."""


class DigitsClassifier(nn.Module):
    """Convolutional classifier of 16x16 images."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            Conv2d(1, 32, 3, stride=2, padding=1),
            nn.GELU(),
            Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            Linear(64 * 16, _FEATURES),
        )
        self.head = Linear(_FEATURES, NUM_CLASSES)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features [B, 48] of images [B, C, 16, 16] in [0, 1]; of several channels it sees their mean."""
        grey = images.mean(1, keepdim=True)
        return torch.cat([self.trunk(2 * chunk - 1) for chunk in grey.split(2000)])

    def logits(self, features: Tensor) -> Tensor:
        """Class logits [B, 10] of features."""
        return self.head(F.gelu(features))


def train_classifier(progress: Progress | None = None) -> DigitsClassifier:
    """Cross-entropy on rendered training digits."""
    seeds.seed_all(0)
    model = DigitsClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warmup_cosine, total=_ITERATIONS, warmup=100))
    generator = seeds.generator(1)
    originals, labels = digit_images("train")
    for step in range(_ITERATIONS):
        rows = torch.randint(len(originals), (256,), generator=generator, dtype=torch.int64)
        images = render(originals[rows], generator)
        loss = F.cross_entropy(model.logits(model.trunk(2 * images - 1)), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1, _ITERATIONS, f"loss {loss.item():.3f}")
    return model.eval().requires_grad_(False)


def load_or_train_classifier(progress: Progress | None = None) -> DigitsClassifier:
    """The cached classifier, trained on first use."""
    path = cache_dir() / f"digits-classifier-{_VERSION}.safetensors"

    def read() -> DigitsClassifier:
        model = DigitsClassifier()
        load_state(model, load_tensors(path)[0], path)
        return model.eval().requires_grad_(False)

    return cached(path, read, lambda: save_tensors(path, train_classifier(progress).state_dict(), {}))

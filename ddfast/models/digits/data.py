"""The embedded task: scikit-learn's handwritten digits on a larger canvas.

The 1,797 real 8x8 images are enlarged and placed at random positions and sizes on a 16x16 canvas, light on dark or
dark on light. Size, place and polarity are properties of the whole image, so its tokens depend strongly on each other
even when the class is known: a model that draws every token independently mixes polarities and tears strokes apart.
That is what makes this small task tell one-step generators apart.

Dimensions: B batch.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast import seeds

CANVAS = 16
NUM_CLASSES = 10
HELD_OUT = 300


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

"""Images in the sizes that judges' networks read, resized as those who published the figures did it.

Dimensions: B batch, H height, W width.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLEAN_SIZE = 299
"""Side of the images that Inception reads."""


def clean_resize(pixels: Tensor) -> Tensor:
    """Images as clean-fid gives them to Inception: bicubic, smoothed where they shrink, never rounded to 8 bit.

    Pillow resizes every channel in float32, in its mode F, where 8-bit modes would round twice. What bicubic overshoots
    is clipped; the sides' ratio is not kept. An image alone and in a batch have the same bits.

    Args:
        pixels: uint8 [B, 3, H, W].

    Returns:
        float32 [B, 3, 299, 299] in 0..255, on the CPU.

    Raises:
        ValueError: pixels have another shape or dtype.

    Source: Parmar et al. 2022, On Aliased Resizing and Surprising Subtleties in GAN Evaluation.
    """
    _check(pixels)
    resized = np.empty((*pixels.shape[:2], CLEAN_SIZE, CLEAN_SIZE), dtype=np.float32)
    for image, channels in zip(resized, pixels.cpu().numpy(), strict=True):
        for channel, plane in zip(image, channels, strict=True):
            floats = Image.fromarray(plane.astype(np.float32))
            channel[:] = np.asarray(floats.resize((CLEAN_SIZE, CLEAN_SIZE), Image.Resampling.BICUBIC))
    return torch.from_numpy(resized).clamp_(0, 255)


def clip_resize(pixels: Tensor, size: int) -> Tensor:
    """Images as CLIP's authors prepare them: the shorter side becomes `size`, bicubic in 8 bit, and the middle is cut.

    Args:
        pixels: uint8 [B, 3, H, W].
        size: of the model's images.

    Returns:
        uint8 [B, 3, size, size], on the CPU.

    Raises:
        ValueError: pixels have another shape or dtype.

    Source: Radford et al. 2021 (CLIP), whose code resizes by Pillow.
    """
    _check(pixels)
    height, width = pixels.shape[2:]
    shorter = min(height, width)
    height, width = size * height // shorter, size * width // shorter
    top, left = round((height - size) / 2), round((width - size) / 2)
    resized = np.empty((len(pixels), size, size, 3), dtype=np.uint8)
    for made, image in zip(resized, pixels.cpu().permute(0, 2, 3, 1).numpy(), strict=True):
        picture = Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BICUBIC)
        made[:] = np.asarray(picture.crop((left, top, left + size, top + size)))
    return torch.from_numpy(resized).permute(0, 3, 1, 2)


def _check(pixels: Tensor) -> None:
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or not min(pixels.shape[2:]):
        raise ValueError(f"pixels: got {list(pixels.shape)} of {pixels.dtype}, expected [B, 3, H, W] of torch.uint8")

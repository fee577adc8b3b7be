"""Small images that differ as pictures do."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def pictures(count: int, seed: int, size: int = 32) -> Tensor:
    """Images uint8 [count, 3, size, size] of blots in colours, that differ as pictures do."""
    generator = torch.Generator().manual_seed(seed)
    blots = torch.randn(count, 3, 4, 4, generator=generator)
    colour = torch.randn(count, 3, 1, 1, generator=generator)
    fine = torch.randn(count, 3, size, size, generator=generator)
    smooth = F.interpolate(blots, (size, size), mode="bicubic")
    return (128 + 40 * smooth + 25 * colour + 20 * fine).clamp(0, 255).to(torch.uint8)


def channels_last(images: Tensor) -> np.ndarray:
    """As npz files hold them."""
    return images.permute(0, 2, 3, 1).contiguous().numpy()

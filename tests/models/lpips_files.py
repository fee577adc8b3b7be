"""LPIPS weights of random values in the two official layouts."""

from pathlib import Path

import torch
from torch import Tensor

LAYERS = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
WIDTHS = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]


def random_lpips() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of torchvision's VGG16 and of the lpips package's vgg.pth."""
    generator = torch.Generator().manual_seed(0)
    vgg, before = {"classifier.0.weight": torch.zeros(2, 2)}, 3
    for layer, width in zip(LAYERS, WIDTHS, strict=True):
        weight = torch.randn(width, before, 3, 3, generator=generator)
        vgg[f"features.{layer}.weight"] = weight * (2 / (9 * before)) ** 0.5
        vgg[f"features.{layer}.bias"] = 0.1 * torch.randn(width, generator=generator)
        before = width
    linear = {
        f"lin{stage}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
        for stage, width in enumerate((64, 128, 256, 512, 512))
    }
    return vgg, linear


def write_lpips(folder: Path) -> tuple[Path, Path]:
    """The two files."""
    paths = folder / "vgg16.pth", folder / "vgg.pth"
    for path, content in zip(paths, random_lpips(), strict=True):
        torch.save(content, path)
    return paths

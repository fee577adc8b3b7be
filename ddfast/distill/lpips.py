"""LPIPS: a perceptual distance of images, in the features of VGG16.

Source: Zhang et al. 2018, arXiv 1801.03924. The weights are the user's: torchvision's VGG16 and the lpips package's
linear layers.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.models.checkpoint import build_around, read_checkpoint
from ddfast.models.layers import Conv2d
from ddfast.models.official import largest_set

# VGG16's convolutions by stage: (layer number in torchvision, output channels).
_STAGES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)


class LPIPS(nn.Module):
    """sum over stages of mean over pixels of w . (f(x) / |f(x)| - f(y) / |f(y)|)^2, f the features after each stage.

    Parameters carry the names of the two files, so that these load as they are.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        channels = 3
        for stage in _STAGES:
            for layer, width in stage:
                self.features[str(layer)] = Conv2d(channels, width, 3, padding=1)
                channels = width
        for number, stage in enumerate(_STAGES):
            linear = nn.ModuleDict({"1": Conv2d(stage[-1][1], 1, 1, bias=False)})
            setattr(self, f"lin{number}", nn.ModuleDict({"model": linear}))
        self.derive_buffers()

    def derive_buffers(self) -> None:
        """The normalisation of the inputs: ImageNet's, for images in [-1, 1]."""
        for name, values in (("shift", [-0.030, -0.088, -0.188]), ("scale", [0.458, 0.448, 0.450])):
            channels = torch.tensor(values, dtype=torch.float32)
            self.register_buffer(name, channels[:, None, None], persistent=False)

    @classmethod
    def load(cls, vgg: Path, linear: Path) -> LPIPS:
        """The distance with its weights.

        Args:
            vgg: torchvision's VGG16 (`vgg16-397923af.pth`), as .pth or .safetensors; its classifier is not used.
            linear: the lpips package's `vgg.pth`.

        Raises:
            DDFastError: a file is missing, damaged or unsafe, or a tensor is missing or of another shape.
        """
        trunk, layers = (largest_set(read_checkpoint(Path(path))[0], path) for path in (vgg, linear))
        tensors = {name: value for name, value in trunk.items() if not name.startswith("classifier.")}
        return build_around(cls, {**tensors, **layers}, f"{vgg} with {linear}", dtype=torch.float32)

    def _stages(self, images: Tensor) -> list[Tensor]:
        """Features of every stage, normalised over channels."""
        x = (images.expand(-1, 3, -1, -1) - self.shift) / self.scale
        found = []
        for number, stage in enumerate(_STAGES):
            if number:
                x = F.max_pool2d(x, 2)
            for layer, _ in stage:
                x = F.relu(self.features[str(layer)](x))
            # The norm as sqrt(sum + tiny): its gradient at vanishing features is finite, its value the same.
            norm = (x.square().sum(1, keepdim=True) + 1e-20).sqrt()
            found.append(x / (norm + 1e-10))
        return found

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Distance float32 [B] of images [B, 3, H, W] (or one channel) to target, both in [-1, 1].

        Differentiable in both; in float32 also under autocast.

        Raises:
            ValueError: the images are smaller than the four halvings of VGG16 allow.
        """
        if min(images.shape[-2:]) < 16:
            raise ValueError(f"images: got {list(images.shape[-2:])} pixels, expected at least 16 x 16 for LPIPS")
        total = images.new_zeros(len(images), dtype=torch.float32)
        with torch.autocast(images.device.type, enabled=False):
            pairs = zip(self._stages(images.float()), self._stages(target.float()), strict=True)
            for number, (x, y) in enumerate(pairs):
                linear = getattr(self, f"lin{number}")["model"]["1"]
                total = total + linear((x - y).square()).mean((1, 2, 3))
        return total

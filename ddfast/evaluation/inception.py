"""The Inception network of 2015-12-05 in whose features the field takes its distances, with weights that the user has.

The network is torch-fidelity's (`pip install 'ddfast[fid]'`), which matches TensorFlow's graph. What it has no name for
is taken from its layers.

Dimensions: B batch, H height, W width.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast import processes
from ddfast.errors import DDFastError, first_line
from ddfast.evaluation.resizing import CLEAN_SIZE as SIDE
from ddfast.evaluation.resizing import clean_resize
from ddfast.files import file_sha256
from ddfast.messages import warn
from ddfast.models.checkpoint import AnyTensor, read_checkpoint, read_tensor, tensors_of
from ddfast.precision import without_tf32

PUBLISHED = "6726825d"
"""First digits of the SHA-256 of torch-fidelity's weights-inception-2015-12-05-6726825d.pth; pytorch-fid's
pt_inception-2015-12-05-6726825d.pth has the same: they are one file under two names."""

POOL, SPATIAL, LOGITS = "pool_3", "mixed_6/conv", "logits"
"""What is read of the network, by its names in TensorFlow's graph; of `mixed_6/conv` the first 7 channels."""

_LAYERS = (
    "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2",
    "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a",
    "Mixed_7b", "Mixed_7c", "AvgPool",
)  # fmt: skip
_SPATIAL_LAYER, _SPATIAL_CHANNELS = "Mixed_6d", 7
_AT_A_TIME = 64


class Inception:
    """The network with the weights of a file.

    Args:
        path: of the weights, as torch-fidelity and pytorch-fid publish them, or as safetensors.
        device: where it runs.

    Attributes:
        sha256: of the file.

    Raises:
        DDFastError: torch-fidelity or what it needs is missing or does not fit; the file is missing, damaged, unsafe,
            or another network's; its name says another hash than it has.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        make = _torch_fidelity()
        tensors = _weights(path)
        self.sha256 = processes.first_does(lambda: file_sha256(path))
        promised = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
        if promised and not self.sha256.startswith(promised[1]):
            raise DDFastError(
                f"--inception {path}: its name says {promised[1]}, its content has the SHA-256 {self.sha256[:8]}...: "
                "it is damaged, or has another file's name; download it again"
            )
        if not self.sha256.startswith(PUBLISHED):
            warn(f"{path} has not the published weights ({PUBLISHED}): its figures compare with nobody else's")
        content = io.BytesIO()  # torch-fidelity would unpickle anything that is in the file: it gets what was read here
        torch.save({name: read_tensor(value) for name, value in tensors.items()}, content)
        content.seek(0)
        try:
            self.network = make("inception", ["2048"], feature_extractor_weights_path=content)
        except RuntimeError as error:
            reason = " ".join(str(error).split("\n")[1:3]).strip() or first_line(error)
            raise DDFastError(f"--inception {path}: is not the Inception of 2015-12-05: {reason[:200]}") from error
        self.network.to(device)
        self.device = torch.device(device)
        missing = [name for name in _LAYERS if not hasattr(self.network, name)]
        if missing:
            raise DDFastError(f"torch-fidelity's Inception has no layer {missing[0]}: install torch-fidelity 0.4.0")

    def look(self, pixels: Tensor, prepare: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """What it sees in images, on its device.

        Args:
            pixels: uint8 [B, 3, H, W].
            prepare: makes of pixels what the first layer takes, float32 [B, 3, 299, 299] in [-1, 1].

        Returns:
            `POOL` [B, 2048]; `SPATIAL` [B, 17 * 17 * 7], in TensorFlow's order: rows, columns, channels; `LOGITS`
            [B, 1008], without bias, as the Inception score takes them. All float32, without TensorFloat-32.
        """
        parts = [self._look(prepare(part.to(self.device))) for part in pixels.split(_AT_A_TIME)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def _look(self, x: Tensor) -> dict[str, Tensor]:
        seen = {}
        with without_tf32():
            for name in _LAYERS:
                layer = getattr(self.network, name)
                if name == _SPATIAL_LAYER:
                    seen[SPATIAL] = layer.branch1x1(x)[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
                x = layer(x)
            seen[POOL] = x.flatten(1)
            seen[LOGITS] = seen[POOL].mm(self.network.fc.weight.T)
        return seen


def prepared_as_tensorflow(pixels: Tensor) -> Tensor:
    """Pixels uint8 [B, 3, H, W] as TensorFlow's graph gives them to its first layer."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    resized = interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), size=(SIDE, SIDE), align_corners=False)
    return (resized - 128) / 128


def prepared_as_pytorch_fid(pixels: Tensor) -> Tensor:
    """Pixels uint8 [B, 3, H, W] as pytorch-fid gives them to its first layer."""
    resized = F.interpolate(pixels.float() / 255, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return 2 * resized - 1


def prepared_as_clean_fid(pixels: Tensor) -> Tensor:
    """Pixels uint8 [B, 3, H, W] as clean-fid gives them to its first layer."""
    return (clean_resize(pixels).to(pixels.device) - 128) / 128


def _torch_fidelity() -> Any:
    """The class of the network."""
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except ImportError as error:
        raise DDFastError(
            f"--inception: {error.name or 'torch_fidelity'} is not installed: pip install 'ddfast[fid]'"
        ) from error
    except (RuntimeError, AttributeError) as error:  # torchvision's operators are compiled for one PyTorch
        raise DDFastError(
            f"--inception: torchvision does not fit PyTorch {torch.__version__} ({first_line(error)}): install the "
            "torchvision of this PyTorch, from where that came"
        ) from error
    return FeatureExtractorInceptionV3


def _weights(path: Path) -> Mapping[str, AnyTensor]:
    """The tensors of a file that may be the network's; another one's that people have is named."""
    tensors = tensors_of(read_checkpoint(path)[0])
    head = tensors.get("fc.weight")
    if any(name.startswith("AuxLogits.") for name in tensors) or (head is not None and head.shape[0] == 1000):
        raise DDFastError(
            f"--inception {path}: is torchvision's classifier, which was trained otherwise; the field's is "
            f"weights-inception-2015-12-05-{PUBLISHED}.pth (torch-fidelity) or pt_inception-2015-12-05-{PUBLISHED}.pth "
            "(pytorch-fid)"
        )
    if not any(name.startswith("Mixed_7c.") for name in tensors):
        there = ", ".join(list(tensors)[:2]) or "no tensors"
        raise DDFastError(f"--inception {path}: is no Inception network ({there}, ...)")
    # A count of training steps, which nothing reads, and not every file has.
    return {name: value for name, value in tensors.items() if not name.endswith(".num_batches_tracked")}

"""Inception of the published layout with random weights, and torchvision beside a PyTorch for CPUs.

torchvision of PyPI holds operators for PyTorch with CUDA; beside another one, its import ends at two of them that are
not there. Here, and nowhere else, they are defined without a body: nothing that is tested calls them.
"""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from pixels import pictures
from torch import Tensor, nn

_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


def import_torchvision() -> None:
    """Import it, with the two operators where they are missing."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            _OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


import_torchvision()


@functools.cache
def random_weights() -> dict[str, Tensor]:
    """Tensors of the published file's names and shapes; activations of `pictures` have about the size of one.

    Names and shapes are torchvision's own network's with 1008 classes, on which pytorch-fid puts its file.
    """
    from torchvision.models import inception_v3

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = inception_v3(num_classes=1008, aux_logits=False, init_weights=False, transform_input=False)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # of one batch, below, all is learnt
                nn.init.uniform_(module.weight, 0.7, 1.3)
                nn.init.normal_(module.bias, 0.0, 0.3)
        nn.init.normal_(network.fc.weight, 0.0, 0.15)
        nn.init.normal_(network.fc.bias, 0.0, 0.5)
        resized = F.interpolate(pictures(16, 1).float(), (299, 299), mode="bilinear")
        with torch.no_grad():
            network.train()(resized / 128 - 1)
    return {name: value.detach() for name, value in network.state_dict().items()}


def write_weights(path: Path) -> Path:
    """The file."""
    torch.save(random_weights(), path)
    return path

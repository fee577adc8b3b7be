"""The recorded outputs of the official code (tests/golden), and the comparison with them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


class Case:
    """One folder of tests/golden: its configuration, its tensors, and its tolerances."""

    def __init__(self, name: str) -> None:
        self.folder = GOLDEN / name
        self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        self.io = load_file(self.folder / "io.safetensors")

    def __getitem__(self, name: str) -> Tensor:
        return self.io[name]

    def file(self, name: str) -> Path:
        return self.folder / name

    def check(self, **outputs: Tensor) -> None:
        """Each output equals the recorded tensor of its name: integers exactly, others within their tolerance."""
        for name, value in outputs.items():
            expected, tolerance = self.io[name], self.config["tolerance"][name]
            assert value.shape == expected.shape, name
            if not expected.is_floating_point():
                assert torch.equal(value, expected), name
            else:
                error = (value - expected).abs().max().item()
                assert error <= tolerance["atol"], f"{name}: {error:.2e} > {tolerance['atol']}"


def as_latents(embeddings: Tensor, like: Tensor) -> Tensor:
    """[B, N, D] in raster order as [B, D, h, w]."""
    return embeddings.transpose(1, 2).reshape(like.shape)

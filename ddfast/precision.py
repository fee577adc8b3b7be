"""Products of float32 numbers as they are, where figures depend on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Within, a GPU's convolutions and matrix products of float32 do not round to TensorFloat-32, whatever is set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    cudnn = torch.backends.cudnn
    kept = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "benchmark_limit", "deterministic")}
    try:
        with cudnn.flags(**kept, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)

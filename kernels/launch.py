"""What the launches share."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this is imported), on tensors of any device."""

FUSED: dict[str, Any] = {} if INTERPRETED else {"enable_fp_fusion": True}
UNFUSED: dict[str, Any] = {} if INTERPRETED else {"enable_fp_fusion": False}
"""Whether a product and a sum may round once; Triton's own default is about to change."""


def current_device(tensor: Tensor) -> torch.cuda.device:
    """Makes the tensor's GPU the current one, which is where Triton launches; nothing for another tensor."""
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)


def multiprocessors(tensor: Tensor) -> int:
    """How many the tensor's GPU has; an H200's where there is none."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 132


def capability(tensor: Tensor) -> int:
    """Of the tensor's GPU, 90 for 9.0; an H200's where there is none."""
    major, minor = torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)
    return 10 * major + minor

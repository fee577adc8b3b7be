"""What the launches share: which configurations are tried, and how rows are counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this is imported), on tensors of any device."""

FUSED: dict[str, Any] = {} if INTERPRETED else {"enable_fp_fusion": True}
UNFUSED: dict[str, Any] = {} if INTERPRETED else {"enable_fp_fusion": False}
"""Whether a product and a sum may round once; Triton's own default is about to change."""


def tuned(configs: Callable[[int], list[triton.Config]], key: Sequence[str]) -> Callable:
    """Choose among a code dimension's configurations by time, once per key and GPU; Triton keeps the choice on disk.

    The interpreter has nothing to time, and pays by the operation: it gets large tiles.
    """
    if INTERPRETED:
        return triton.autotune([triton.Config({"ROWS": 256, "CODES": 512})], key=list(key))
    every = list({str(config): config for dim in (1, 64) for config in configs(dim)}.values())

    def of_this_size(_: Sequence[triton.Config], arguments: Mapping[str, Any], **more: Any) -> list[triton.Config]:
        return configs({**arguments, **more}["dim"])

    prune = {"early_config_prune": of_this_size}
    return triton.autotune(every, key=list(key), prune_configs_by=prune, cache_results=True)


def tiles(*sizes: tuple[int, int, int], num_stages: int = 2) -> list[triton.Config]:
    """Configurations of (rows, codes, warps)."""
    return [
        triton.Config({"ROWS": rows, "CODES": codes}, num_warps=warps, num_stages=num_stages)
        for rows, codes, warps in sizes
    ]


def shape_class(rows: int) -> int:
    """Rows rounded up to a power of two: what a choice of configuration is remembered by."""
    return triton.next_power_of_2(max(rows, 1))


def padded_dim(arguments: Mapping[str, Any]) -> int:
    """A kernel's DIM: `dim` up to a power of two, and to 16 where rows are multiplied as matrices."""
    dim = triton.next_power_of_2(arguments["dim"])
    return dim if arguments["ROWS"] == 1 else max(16, dim)


def current_device(tensor: Tensor) -> torch.cuda.device:
    """Makes the tensor's GPU the current one, which is where Triton launches; nothing for another tensor."""
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)


def multiprocessors(tensor: Tensor) -> int:
    """How many the tensor's GPU has; an H200's where there is none."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 132

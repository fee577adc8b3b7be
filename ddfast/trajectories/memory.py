"""How many samples a teacher can decode at a time in the memory that is free."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ddfast import env
from ddfast.errors import DDFastError
from ddfast.models.protocol import Teacher

_SHARE = 0.8
"""Of the free memory, what a batch may take: the rest is for fragmentation and for what else the machine does."""

_ROWS = 8
"""Float32 rows, as wide as the widest layer, per token of the largest group: what a step's layers, guidance, filters
and flow hold for a moment. Guided VAR-d16 and the digits teacher were measured on a CPU to need 6 to 7."""


def largest_batch(teacher: Teacher) -> int:
    """Samples that `teacher` can decode at a time in the memory free now, at least 1.

    Raises:
        DDFastError: not even one fits.
    """
    device = teacher.codebook.device
    sample, free = sample_bytes(teacher), free_bytes(device)  # in this order: a first pass loads libraries
    fit = int(_SHARE * free / sample)
    if fit < 1:
        raise DDFastError(
            f"not enough memory on {device}: {free / 2**20:.0f} MiB are free, and decoding one sample takes about "
            f"{sample / 2**20:.0f} MiB; free some, or try with --trajectories.batch-size 1"
        )
    return fit


def sample_bytes(teacher: Teacher) -> int:
    """Bytes that one more sample in a batch takes while it is decoded by the teacher's flow.

    What lasts is measured: the condition and the decoding state of one sample that has all of its groups but the last,
    so that a cache is full, also one that grows. What a step holds for a moment is counted as `_ROWS` says.
    """
    device = teacher.codebook.device
    scales = [teacher.group_cfg_scale(teacher.defaults.cfg_scale, group) for group in range(len(teacher.groups))]
    with torch.inference_mode():
        condition = teacher.condition_of(torch.zeros(1, dtype=torch.int64, device=device))
        state = teacher.begin(condition, guided=any(scale != 1.0 for scale in scales))
        known = teacher.num_tokens - teacher.groups[-1]
        teacher.advance(state, torch.zeros(1, known, dtype=torch.int64, device=device))
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*teacher.parameters(), *teacher.buffers())}
    storages = [tensor.untyped_storage() for tensor in _tensors((condition, state), set())]
    lasting = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in weights}
    linear = [module.out_features for module in teacher.modules() if isinstance(module, nn.Linear)]
    passing = 4 * _ROWS * max(teacher.groups) * max([teacher.num_codes, *linear])
    noise = 4 * teacher.num_tokens * teacher.code_dim
    return sum(lasting.values()) + passing + noise


def free_bytes(device: torch.device) -> int:
    """Bytes free for new tensors on `device`; where processes of torchrun share it, one's share of them."""
    _, processes = env.local_rank_and_world_size()
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own to use again
        return (torch.cuda.mem_get_info(device)[0] + cached) // math.ceil(processes / torch.cuda.device_count())
    return _available_ram() // processes


def _available_ram() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: only what is installed can be asked for, and half of it is a guess
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in `value`: in its containers, and in the attributes of its objects other than modules."""
    if id(value) in seen or isinstance(value, (nn.Module, type)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        value = list(value.values())
    parts = value if isinstance(value, (list, tuple)) else list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from _tensors(part, seen)

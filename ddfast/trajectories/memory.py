"""How many samples a teacher can decode, or a student draw, at a time in the memory that is free."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ddfast import env, private_api
from ddfast.errors import DDFastError, is_out_of_memory
from ddfast.models.autoregressive import Condition
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student

_SHARE = 0.8
"""Of the free memory, what a batch may take: the rest is for fragmentation and for what else the machine does."""

_ROWS = 8
"""Float32 rows, as wide as the widest layer, per token of the largest group: what a step's layers, guidance, filters
and flow hold for a moment. Guided VAR-d16 and the digits teacher were measured on a CPU to need 6 to 7. A student's
pass is counted as these rows for all tokens (VAR-d16, LlamaGen-B: measured 1 to 4), a decoded image as so many of its
decoder's largest activation (theirs: 6 to 8)."""

BATCH_OPTION = "--batch-size (of a run's figures: --evaluation.batch-size)"
"""How a command is told how many samples to make at a time."""

_MOST = 1000
"""Samples at a time beyond which nothing gets faster."""


def largest_batch(teacher: Teacher) -> int:
    """Samples that `teacher` can decode at a time in the memory free now, at least 1.

    Raises:
        DDFastError: not even one fits.
    """
    return _fitting(sample_bytes(teacher), teacher.codebook.device, "--trajectories.batch-size")


def largest_sampling_batch(
    teacher: Teacher, student: Student | None, *, decodes: bool, images: bool, condition: Condition | None = None
) -> int:
    """Samples that can be drawn at a time in the memory free now, at least 1 and at most 1000.

    Args:
        teacher: of the student.
        student: None: the teacher alone makes the samples.
        decodes: the teacher takes part.
        images: they become images.
        condition: as in `sample_bytes`.

    Raises:
        DDFastError: not even one fits.
    """
    sample = sample_bytes(teacher, condition) if decodes else 0
    if student is not None:
        sample += 4 * _ROWS * teacher.num_tokens * max(teacher.num_codes, _widest(student))
    if images:
        sample += image_bytes(teacher)
    return min(_fitting(sample, teacher.codebook.device, "--batch-size"), _MOST)


def _fitting(sample: int, device: torch.device, option: str) -> int:
    """How many samples of so many bytes fit; the option is what else there is to try."""
    free = free_bytes(device)  # after the sample's passes: the first of them load libraries
    fit = int(_SHARE * free / sample)
    if fit < 1:
        raise DDFastError(
            f"not enough memory on {device}: {free / 2**20:.0f} MiB are free, and decoding one sample takes about "
            f"{sample / 2**20:.0f} MiB; free some, or try with {option} 1"
        )
    return fit


@contextlib.contextmanager
def fitting(count: int, device: torch.device, option: str) -> Iterator[None]:
    """Within, memory that does not suffice for `count` samples at a time is one error, which names what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        what = f"{count} samples at a time do not fit in the memory of {device}"
        raise DDFastError(f"{what}; give {option} a smaller number") from error


def sample_bytes(teacher: Teacher, condition: Condition | None = None) -> int:
    """Bytes that one more sample in a batch takes while it is decoded by the teacher's flow.

    Args:
        teacher: with the settings that it decodes with.
        condition: of one sample, on the teacher's device; None: the first that the teacher has.

    What lasts is measured: the condition and the decoding state of one sample that has all of its groups but the last,
    so that a cache is full, also one that grows. What a step holds for a moment is counted as `_ROWS` says.
    """
    device = teacher.codebook.device
    scales, _ = teacher.guidance_and_filters()
    with torch.inference_mode():
        if condition is None:
            condition = teacher.condition_of(torch.zeros(1, dtype=torch.int64, device=device))
        state = teacher.begin(condition, guided=any(scale != 1.0 for scale in scales))
        known = teacher.num_tokens - teacher.groups[-1]
        teacher.advance(state, torch.zeros(1, known, dtype=torch.int64, device=device))
    weights = {private_api.storage_key(tensor) for tensor in (*teacher.parameters(), *teacher.buffers())}
    storages = {private_api.storage_key(tensor): tensor for tensor in _tensors((condition, state), set())}
    lasting = {key: tensor.untyped_storage().nbytes() for key, tensor in storages.items() if key not in weights}
    passing = 4 * _ROWS * max(teacher.groups) * max(teacher.num_codes, _widest(teacher))
    noise = 4 * teacher.num_tokens * teacher.code_dim
    return sum(lasting.values()) + passing + noise


def image_bytes(teacher: Teacher) -> int:
    """Bytes that one more image takes while it is decoded: `_ROWS` of the largest activation, which is measured."""
    largest = 0

    def look(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal largest
        largest = max([largest, *(tensor.numel() for tensor in _tensors(output, set()))])

    hooks = [module.register_forward_hook(look) for module in teacher.modules()]
    try:
        with torch.inference_mode():
            device = teacher.codebook.device
            image = teacher.decode(torch.zeros(1, teacher.num_tokens, dtype=torch.int64, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return 4 * _ROWS * max(largest, image.numel())


def _widest(network: nn.Module) -> int:
    """Width of the widest linear layer."""
    return max((module.out_features for module in network.modules() if isinstance(module, nn.Linear)), default=0)


def free_bytes(device: torch.device) -> int:
    """Bytes free for new tensors on `device`; of a machine's own memory, a process's share of them."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own to use again
        return torch.cuda.mem_get_info(device)[0] + cached  # of several processes, each has a GPU of its own
    return _available_ram() // env.local_rank_and_world_size()[1]


def release_memory() -> None:
    """Give back what nobody refers to but circles of objects, as networks that were spread are."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


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

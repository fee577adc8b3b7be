"""Seconds per image, side by side in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ddfast import processes
from ddfast.evaluation.sources import Make, sources_for
from ddfast.models.decoding import release_graphs
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.progress import Progress, silent
from ddfast.sampling import first_request
from ddfast.trajectories.memory import fitting

IMAGE_DECODER = "image_decoder"

_WARM_UP_ROUNDS = 2
_ENOUGH_SECONDS = 20.0
"""What one source may take of a measurement before its rounds end: 256 steps take minutes on a CPU."""


@torch.no_grad()
def measure_speed(
    teacher: Teacher,
    student: Student,
    *,
    batch_sizes: tuple[int, ...],
    rounds: int = 7,
    progress: Progress = silent,
) -> dict[str, dict[int, float]]:
    """Median seconds per image of AR decoding, the student and the image decoder, every source timed once a round.

    Of several processes the first one alone is timed, while the others wait.

    Args:
        teacher, student: what is timed; guidance and filters are the teacher's defaults.
        batch_sizes: images per call.
        rounds: repetitions after two that warm up; fewer for a source that takes more than 20 seconds in all.
        progress: called with rounds done, rounds in all, and the source.

    Returns:
        {source: {batch size: seconds per image}} for the timed ones of `SOURCES` that can be had, where "teacher" is
        `Teacher.generate`, "teacher_plain" `plain_decoder` and "independent_marginals" one draw from tables made
        before; and where the teacher has a decoder, for `IMAGE_DECODER`: codes to pixels, which every other source
        leaves out.
    """
    makers = {source.name: source.maker(teacher) for source in sources_for(teacher, student) if source.timed}
    return processes.first_does(lambda: _timed(makers, teacher, student, batch_sizes, rounds, progress))


def _timed(
    makers: dict[str, Make],
    teacher: Teacher,
    student: Student,
    batch_sizes: tuple[int, ...],
    rounds: int,
    progress: Progress,
) -> dict[str, dict[int, float]]:
    """What `measure_speed` returns."""
    device = teacher.codebook.device
    result: dict[str, dict[int, float]] = {}
    turns = _WARM_UP_ROUNDS + rounds
    for number, batch in enumerate(batch_sizes):
        request = first_request(teacher, student, batch)
        codes = torch.randint(teacher.num_codes, (batch, teacher.num_tokens), dtype=torch.int64, device=device)
        sources: dict[str, Callable[[], Tensor]] = {name: partial(make, request) for name, make in makers.items()}
        if teacher.has_decoder:
            sources[IMAGE_DECODER] = partial(teacher.decode, codes)
        seconds: dict[str, list[float]] = {name: [] for name in sources}
        for turn in range(turns):
            for name, make in sources.items():
                progress(number * turns + turn, len(batch_sizes) * turns, f"{name}, batch {batch}")
                if sum(seconds[name]) < _ENOUGH_SECONDS:
                    with fitting(batch, device, "--evaluation.batch-sizes"):
                        seconds[name].append(_seconds(make, device))
        for name, values in seconds.items():
            counted = values[_WARM_UP_ROUNDS:] or values[-1:]
            result.setdefault(name, {})[batch] = statistics.median(counted) / batch
    release_graphs(teacher)
    progress(len(batch_sizes) * turns, len(batch_sizes) * turns, "done")
    return result


def _seconds(make: Callable[[], Tensor], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    make()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Seconds per image, side by side in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ddfast import seeds
from ddfast.evaluation.plain_decoding import plain_decoder
from ddfast.models.decoding import release_graphs
from ddfast.models.digits import Progress
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.ops import noise
from ddfast.sampling import draw_marginals, first_conditions, marginal_tables, sources_for

_WARM_UP_ROUNDS = 2
_ENOUGH_SECONDS = 20.0
"""What one source may take of a measurement before its rounds end: 256 steps take minutes on a CPU."""


@torch.no_grad()
def measure_speed(
    teacher: Teacher,
    student: Student,
    *,
    batch_sizes: tuple[int, ...],
    point: int,
    rounds: int = 7,
    progress: Progress | None = None,
) -> dict[str, dict[int, float]]:
    """Median seconds per image of AR decoding, the student and the image decoder, every source timed once a round.

    Args:
        teacher, student: what is timed; guidance and filters are the teacher's defaults.
        batch_sizes: images per call.
        point: t1, the point of the second step.
        rounds: repetitions after two that warm up; fewer for a source that takes more than 20 seconds in all.
        progress: called with rounds done, rounds in all, and the source.

    Returns:
        {source: {batch size: seconds per image}} for "ar" (`Teacher.generate`), "ar_plain" (`plain_decoder`),
        "student_1step", "student_2step", where they can be had "marginals" (one draw from tables made before), and
        "image_decoder" (codes to pixels, which every other source leaves out).
    """
    device = teacher.codebook.device
    tables = None
    if "independent_marginals" in sources_for(teacher):
        tables = marginal_tables(teacher, seeds.generator(0, device), samples_per_class=500)
    result: dict[str, dict[int, float]] = {}
    turns = _WARM_UP_ROUNDS + rounds
    for number, batch in enumerate(batch_sizes):
        index, condition = first_conditions(teacher, batch)
        eps = noise(0, torch.arange(batch, dtype=torch.int64), (teacher.num_tokens, teacher.code_dim), device)
        codes = torch.randint(teacher.num_codes, (batch, teacher.num_tokens), dtype=torch.int64, device=device)
        sources: dict[str, Callable[[], Tensor]] = {
            "ar": partial(teacher.generate, condition),
            "ar_plain": partial(plain_decoder(teacher).generate, condition),
            "student_1step": partial(student.sample, condition, eps),
            "student_2step": partial(student.sample, condition, eps, **student.settings(2, point)),
            "image_decoder": partial(teacher.decode, codes),
        }
        if tables is not None:
            sources["marginals"] = partial(draw_marginals, tables, index)
        seconds: dict[str, list[float]] = {name: [] for name in sources}
        for turn in range(turns):
            for name, make in sources.items():
                if progress is not None:
                    progress(number * turns + turn, len(batch_sizes) * turns, f"{name}, batch {batch}")
                if sum(seconds[name]) < _ENOUGH_SECONDS:
                    seconds[name].append(_seconds(make, device))
        for name, values in seconds.items():
            counted = values[_WARM_UP_ROUNDS:] or values[-1:]
            result.setdefault(name, {})[batch] = statistics.median(counted) / batch
    release_graphs(teacher)
    if progress is not None:
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

"""Seconds per image, side by side in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ddfast.models.protocol import Condition, Teacher, condition_size
from ddfast.models.student import Student
from ddfast.ops import filter_logits, noise
from ddfast.sampling import draw_marginals, marginal_tables, sources_for


def generate_plainly(teacher: Teacher, condition: Condition, generator: torch.Generator | None = None) -> Tensor:
    """AR decoding as a first script would write it: no cache, the whole sequence through the model at every step.

    condition -> codes int64 [B, N], from the same distribution as `Teacher.generate`.
    """
    defaults = teacher.defaults
    codes = torch.zeros(
        condition_size(condition), teacher.num_tokens, dtype=torch.int64, device=teacher.codebook.device
    )
    for group, (first, last) in enumerate(pairwise(teacher.group_starts())):
        logits = teacher.logits(condition, codes)[:, first:last]
        uncond, scale = None, teacher.group_cfg_scale(defaults.cfg_scale, group)
        if scale != 1.0:
            uncond = teacher.logits(condition, codes, unconditional=True)[:, first:last]
        log_probs = filter_logits(
            logits,
            uncond=uncond,
            cfg_scale=scale,
            temperature=defaults.temperature,
            top_k=defaults.top_k,
            top_p=defaults.top_p,
            backend="reference",
        )
        drawn = torch.multinomial(log_probs.exp().flatten(0, 1), 1, generator=generator)
        codes[:, first:last] = drawn.view(codes[:, first:last].shape)
    return codes


@torch.no_grad()
def measure_speed(
    teacher: Teacher,
    student: Student,
    *,
    batch_sizes: tuple[int, ...],
    point: int,
    decode: bool,
    rounds: int = 7,
) -> dict[str, dict[int, float]]:
    """Median seconds per image of AR decoding and of the student, every source timed once a round.

    Args:
        teacher, student: what is timed; guidance and filters are the teacher's defaults.
        batch_sizes: images per call.
        point: t1, the point of the second step.
        decode: include the image decoder.
        rounds: repetitions.

    Returns:
        {source: {batch size: seconds per image}} for "ar" (`Teacher.generate`), "ar_plain" (`generate_plainly`),
        "student_1step", "student_2step" and, where they can be had, "marginals" (one draw from tables made before).
    """
    device = teacher.codebook.device
    tables = None
    if "independent_marginals" in sources_for(teacher):
        tables = marginal_tables(teacher, torch.Generator(device).manual_seed(0), samples_per_class=500)
    result: dict[str, dict[int, float]] = {}
    for batch in batch_sizes:
        index = torch.arange(batch, device=device) % teacher.num_conditions
        condition = teacher.condition_of(index)
        eps = noise(0, torch.arange(batch), (teacher.num_tokens, teacher.code_dim), device)
        sources: dict[str, Callable[[], Tensor]] = {
            "ar": partial(teacher.generate, condition),
            "ar_plain": partial(generate_plainly, teacher, condition),
            "student_1step": partial(student.sample, condition, eps),
            "student_2step": partial(student.sample, condition, eps, steps=(0, point)),
        }
        if tables is not None:
            sources["marginals"] = partial(draw_marginals, tables, index)
        seconds: dict[str, list[float]] = {name: [] for name in sources}
        for turn in range(rounds + 2):
            for name, make in sources.items():
                _wait(device)
                start = time.perf_counter()
                made = make()
                if decode:
                    teacher.decode(made)
                _wait(device)
                if turn >= 2:  # the first two rounds warm up
                    seconds[name].append(time.perf_counter() - start)
        for name, values in seconds.items():
            result.setdefault(name, {})[batch] = statistics.median(values) / batch
    return result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

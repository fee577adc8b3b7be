"""From a folder with a student to samples in files, batch by batch: what `ddfast sample` does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ddfast.errors import DDFastError
from ddfast.models.student import Student
from ddfast.pictures import new_target, save_samples
from ddfast.pipeline import ProgressBar, open_student, open_teacher
from ddfast.recipes import give_captions
from ddfast.sampling import Guidance, second_point, stream_student, teacher_takes_part
from ddfast.trajectories.memory import largest_sampling_batch


def draw(
    *,
    student: Path,
    steps: int,
    teacher_steps: int,
    point: int | None,
    guidance: Guidance,
    classes: Sequence[int] | None,
    captions: Path | None,
    caption: Sequence[str],
    text_encoder: str,
    count: int,
    seed: int,
    batch_size: int,
    format: str,
    to: Path | None,
    device: str,
    progress_bar: ProgressBar,
) -> list[str]:
    """Sample and write; returns what was written, in lines. The arguments are those of `SampleOptions`.

    What can be refused is refused before anything is made: a batch is made, decoded, written and forgotten.

    Raises:
        DDFastError: a folder or a file cannot be used, or what ended the writing early.
        ValueError, TypeError: an argument is out of range, or has no effect.
    """
    _check(steps, captions, caption, text_encoder, batch_size)
    target = new_target(format, to or student / f"samples-{steps}")
    network: Student | None = None
    if steps:
        config, teacher, network = open_student(student, device, progress_bar("teacher"))
    else:
        config, teacher = open_teacher(student, device, progress_bar("teacher"))
    if captions is not None or caption:
        give_captions(teacher, captions or caption, encoder=text_encoder, device=device)
    first = second_point(teacher, network, point, config.dd1.point, steps=steps, teacher_steps=teacher_steps)
    decodes = teacher_takes_part(network, steps, teacher_steps)

    batches = partial(
        stream_student,
        teacher,
        network,
        count=count,
        seed=seed,
        point=first,
        steps=steps,
        teacher_steps=teacher_steps,
        guidance=guidance,
        classes=classes,
    )
    made = batches(batch_size=batch_size or 1)  # refuses what it must before memory is measured
    if not batch_size and count > 1:
        size = largest_sampling_batch(teacher, network, decodes=decodes, images=format != "codes")
        made = batches(batch_size=size)
    return save_samples(made, teacher, format, target, count=count, progress=progress_bar("samples"))


def _check(steps: int, captions: Path | None, caption: Sequence[str], text_encoder: str, batch_size: int) -> None:
    if batch_size < 0:
        raise DDFastError(f"--batch-size: got {batch_size}, expected a positive number, or 0 for what memory holds")
    if steps < 0:
        raise DDFastError(f"--steps: got {steps}, expected at least 0 (the teacher)")
    if captions is not None and caption:
        raise DDFastError("--caption: has no effect beside --captions; give one of them")
    if text_encoder and (captions is None and not caption):
        raise DDFastError("--text-encoder: has no effect without --caption or --captions")

"""From a folder with a student to samples in files, batch by batch: what `ddfast sample` does."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from ddfast import processes
from ddfast.config import require_seed
from ddfast.errors import DDFastError
from ddfast.models.llamagen.captions import give_captions
from ddfast.models.student import Student
from ddfast.pictures import new_target, save_samples
from ddfast.progress import ProgressBar
from ddfast.runs import open_student, open_teacher
from ddfast.sampling import Guidance, set_point, stream_student, teacher_takes_part
from ddfast.trajectories.memory import largest_sampling_batch


@dataclasses.dataclass(kw_only=True)
class SampleOptions:
    """What to draw and how.

    Attributes:
        student: folder of a training run, of `ddfast convert` or of `ddfast.hub`.
        steps: DD1: 1 or 2 passes; DD2: one pass, then steps - 1 groups of the teacher's; 0: the teacher, step by step.
        teacher_steps: groups that the teacher regenerates between the passes (from the second step's point on).
        point: where the second step starts; default: where it was trained.
        guidance: settings of the teacher's part; default: those that the student learnt.
        classes: labels (text: numbers of captions) separated by commas; empty: all of them in turn.
        captions: for a text model: file with features (`save_captions`), with a caption in every line, or COCO's JSON.
        caption: for a text model: a caption; may be given several times.
        text_encoder: name or folder of the T5 that encodes captions given as text; default: google/flan-t5-xl.
        count: how many samples.
        seed: of all chance, 0 to 2^64 - 1; sample i of a seed is the same whatever the count, the batch size and the
            number of processes: bit for bit in batches of the same size, else up to the rounding of matrix products.
        batch_size: samples made and written at a time, by each of torchrun's processes; 0: as many as free memory
            holds.
        format: one grid, one png per image, or the codes as safetensors.
        to: where the result goes; default: samples-STEPS in the student's folder. What is there is not overwritten.
        device: where to run.
    """

    student: Path
    steps: int = 1
    teacher_steps: int = 0
    point: int | None = None
    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    classes: str = ""
    captions: Path | None = None
    caption: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    text_encoder: str = ""
    count: int = 64
    seed: int = 0
    batch_size: int = 0
    format: Literal["grid", "files", "codes"] = "grid"
    to: Path | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        require_seed(self.seed)


def draw(options: SampleOptions, progress_bar: ProgressBar) -> list[str]:
    """Sample and write; returns what was written, in lines.

    What can be refused is refused before anything is made: a batch is made, decoded, written and forgotten. Processes
    that are `together` share the batches.

    Raises:
        DDFastError: a folder or a file cannot be used, or what ended the writing early.
        ValueError, TypeError: an argument is out of range, or has no effect.
    """
    _check(options)
    steps, teacher_steps, form = options.steps, options.teacher_steps, options.format
    target = processes.first_does(lambda: new_target(form, options.to or options.student / f"samples-{steps}"))
    network: Student | None = None
    if steps:
        _, teacher, network = open_student(options.student, options.device, progress_bar("teacher"))
    else:
        _, teacher = open_teacher(options.student, options.device, progress_bar("teacher"))
    if form != "codes" and not teacher.has_decoder:
        raise DDFastError(f"--format {form}: this teacher has no image tokenizer; --format codes writes its codes")
    if options.captions is not None or options.caption:
        texts = options.captions or options.caption
        give_captions(teacher, texts, encoder=options.text_encoder, device=options.device)
    set_point(teacher, network, options.point, steps=steps, teacher_steps=teacher_steps)
    decodes = teacher_takes_part(network, steps, teacher_steps)

    batches = partial(
        stream_student,
        teacher,
        network,
        count=options.count,
        seed=options.seed,
        steps=steps,
        teacher_steps=teacher_steps,
        guidance=options.guidance,
        classes=labels(options.classes),
    )
    made = batches(batch_size=options.batch_size or 1)  # refuses what it must before memory is measured
    if not options.batch_size and options.count > 1:
        size = largest_sampling_batch(teacher, network, decodes=decodes, images=form != "codes")
        made = batches(batch_size=min(processes.gather(size)))  # one for all
    return save_samples(made, teacher, form, target, count=options.count, progress=progress_bar("samples"))


def _check(options: SampleOptions) -> None:
    if options.batch_size < 0:
        raise DDFastError(
            f"--batch-size: got {options.batch_size}, expected a positive number, or 0 for what memory holds"
        )
    if options.steps < 0:
        raise DDFastError(f"--steps: got {options.steps}, expected at least 0 (the teacher)")
    if options.captions is not None and options.caption:
        raise DDFastError("--caption: has no effect beside --captions; give one of them")
    if options.text_encoder and options.captions is None and not options.caption:
        raise DDFastError("--text-encoder: has no effect without --caption or --captions")
    labels(options.classes)


def labels(text: str) -> tuple[int, ...] | None:
    """Class labels from "1,2,3"; None for an empty text."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else None
    except ValueError:
        raise DDFastError(f"--classes: got {text!r}, expected numbers separated by commas, such as 1,2,3") from None

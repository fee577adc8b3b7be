"""From a folder with a student to samples in files, batch by batch: what `ddfast sample` does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from ddfast import processes
from ddfast.config import TeacherFiles, TokenizerFiles, require_seed
from ddfast.errors import DDFastError
from ddfast.messages import say
from ddfast.models import families
from ddfast.models.checkpoint import digest
from ddfast.models.llamagen.captions import give_captions
from ddfast.models.protocol import Teacher
from ddfast.models.student import DD1Student, Student
from ddfast.presets import Preset, get_preset
from ddfast.progress import ProgressBar
from ddfast.runs import GivenFiles, open_student, open_teacher, student_header
from ddfast.sampling import (
    Guidance,
    Samples,
    batch_ranges,
    condition_index,
    conditions_of,
    set_point,
    stream_student,
    teacher_takes_part,
)
from ddfast.saving import Kept, image_name, kind_of, new_target, save_stream
from ddfast.trajectories.memory import largest_sampling_batch


@dataclasses.dataclass(kw_only=True)
class DrawOptions:
    """How samples are made, whatever becomes of them.

    Attributes:
        steps: DD1: 1 or 2 passes, with later points more; DD2: one pass, then steps - 1 groups of the teacher's; 0: the
            teacher, step by step.
        teacher_steps: groups that the teacher regenerates between the passes (from the second step's point on).
        refine: passes of the teacher over the student's samples, each with the flow from the same noise; exact: until
            they are the teacher's own.
        point: where the second step starts; default: where it was trained.
        guidance: settings of the teacher's part; default: the preset's, or those that the student learnt.
        preset: var-readme, var-paper, llamagen or dd1: labels, count, settings of the teacher's part, quantise and
            resize as in that published table; what is given beside it is taken in its place.
        classes: labels (text: numbers of captions) separated by commas; empty: all of them.
        labels: uniform (the classes in turn, as many of each) or random; default: uniform, or the preset's.
        captions: for a text model: file with features (`save_captions`), with a caption in every line, or COCO's JSON.
        caption: for a text model: a caption; may be given several times.
        text_encoder: name or folder of the T5 that encodes captions given as text; default: google/flan-t5-xl.
        count: how many samples; default: the preset's, or of `sample` 64, of `evaluate --protocol` 50,000 (clean:
            30,000).
        seed: of all chance, 0 to 2^64 - 1; sample i of a seed is the same whatever the count, the batch size and the
            number of processes: bit for bit in batches of the same size, else up to the rounding of matrix products.
        batch_size: samples made at a time, by each of torchrun's processes; 0: as many as free memory holds.
        quantise: how values become 8 bits: nearest, or as var, llamagen or dd1 do; default: nearest, or the preset's.
        resize: side in pixels that images are resized to before that, bicubic; 0: none; default: 0, or the preset's.
        device: where to run.
        teacher, tokenizer: files of the teacher of a run, where they are not where the run found them.
    """

    steps: int = 1
    teacher_steps: int = 0
    refine: int | Literal["exact"] = 0
    point: int | None = None
    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    preset: str = ""
    classes: str = ""
    labels: Literal["uniform", "random"] | None = None
    captions: Path | None = None
    caption: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    text_encoder: str = ""
    count: int | None = None
    seed: int = 0
    batch_size: int = 0
    quantise: Literal["nearest", "var", "llamagen", "dd1"] | None = None
    resize: int | None = None
    device: str = "cpu"
    teacher: TeacherFiles = dataclasses.field(default_factory=TeacherFiles)
    tokenizer: TokenizerFiles = dataclasses.field(default_factory=TokenizerFiles)

    @property
    def files(self) -> GivenFiles:
        """Those of the teacher, as `open_student` takes them."""
        tables = {"teacher": self.teacher, "tokenizer": self.tokenizer}
        return {f"{table}.{name}": path for table, files in tables.items() for name, path in vars(files).items()}

    def __post_init__(self) -> None:
        require_seed(self.seed)


@dataclasses.dataclass(kw_only=True)
class SampleOptions(DrawOptions):
    """What to draw and how.

    Attributes:
        student: folder of a training run, of `ddfast convert` or of `ddfast.hub`.
        format: one grid, one png per image, an npz (arr_0 uint8 [B, H, W, 3], arr_1 the classes), of a teacher of text
            a line each (an end of line in it is ¶), or the codes as safetensors; default: grid, of text text, or npz
            with a preset.
        to: where the result goes; default: samples-STEPS in the student's folder. What is there is not overwritten; the
            same command goes on where it was ended (but for a grid).
    """

    student: Path
    format: Literal["grid", "files", "npz", "text", "codes"] | None = None
    to: Path | None = None


_IMAGES = ("grid", "files", "npz")
"""Forms that are of images."""


def _usual_form(folder: Path) -> str:
    """What the samples of a folder's student become where nobody says it: of text text, by its file; else a grid.

    What is wrong with the file is told where it is opened.
    """
    try:
        family = student_header(folder).get("family")
    except DDFastError:
        return "grid"
    return "text" if family in families.names() and families.named(family, folder).teacher.makes_text() else "grid"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """What is left to the preset or to a default, decided."""

    count: int = 64
    labels: str = "uniform"
    quantise: str = "nearest"
    resize: int = 0
    format: str = "grid"

    @classmethod
    def of(cls, options: SampleOptions) -> Choices:
        """By the options; where one is given beside a preset, it is said."""
        preset, usual = get_preset(options.preset) if options.preset else None, cls()
        if preset is None and options.format is None:
            usual = cls(format=_usual_form(options.student))
        elif preset is not None:
            usual = cls(
                count=preset.count,
                labels=preset.labels,
                quantise=preset.quantise,
                resize=preset.size,
                format="npz",
            )
        given = {field.name: getattr(options, field.name) for field in dataclasses.fields(cls)}
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if preset is not None and name != "format":
                _say_taken(name, value, getattr(usual, name), preset)
        return dataclasses.replace(usual, **given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """Samples that are about to be made.

    Attributes:
        chosen: what the options left open.
        teacher, network: that make them; None: the teacher alone.
        guidance: of the teacher's part; None: it has none.
        conditions: labels to choose from, int64 [M].
        batch_size: samples at a time.
        stream: makes this process's share of the batches, of batch_size, and of the batches to skip.
    """

    chosen: Choices
    teacher: Teacher
    network: Student | None
    guidance: Guidance | None
    conditions: Tensor
    batch_size: int
    stream: Callable[..., Iterator[Samples]]


def opened(
    options: SampleOptions, chosen: Choices, progress_bar: ProgressBar, *, begun: Mapping[str, Any] | None = None
) -> Drawing:
    """The networks of a folder, and the samples to be made with them; what can be refused is refused here.

    Args:
        options: of the samples.
        chosen: what they left open.
        progress_bar: while the teacher is made.
        begun: settings of a run that goes on.

    Raises:
        DDFastError: the folder cannot be used, or its teacher makes no images.
        ValueError, TypeError: an argument is out of range, or has no effect.
    """
    steps, teacher_steps, form = options.steps, options.teacher_steps, chosen.format
    network: Student | None = None
    bar = progress_bar("teacher")
    if steps:
        _, teacher, network = open_student(options.student, options.device, bar, files=options.files)
    else:
        _, teacher = open_teacher(options.student, options.device, bar, files=options.files)
    if form == "text" and not teacher.makes_text():
        raise DDFastError("--format text: this teacher makes no text; --format codes writes its codes")
    if form in _IMAGES and not teacher.has_decoder:
        other = "text writes its texts" if teacher.makes_text() else "codes writes its codes"
        raise DDFastError(f"--format {form}: this teacher has no image tokenizer; --format {other}")
    if options.captions is not None or options.caption:
        texts = options.captions or options.caption
        give_captions(teacher, texts, encoder=options.text_encoder, device=options.device)
    set_point(teacher, network, options.point, steps=steps, teacher_steps=teacher_steps)
    decodes = teacher_takes_part(network, steps, teacher_steps, options.refine)
    guidance = _guidance(options, teacher, decodes)

    classes = labels(options.classes)
    stream = partial(
        stream_student,
        teacher,
        network,
        count=chosen.count,
        seed=options.seed,
        steps=steps,
        teacher_steps=teacher_steps,
        refine=options.refine,
        guidance=guidance,
        classes=classes,
        labels=chosen.labels,
    )
    stream(batch_size=options.batch_size or 1)  # refuses what it must before memory is measured
    size = options.batch_size or (begun or {}).get("batch_size", 0)
    if not size and chosen.count > 1:
        largest = largest_sampling_batch(teacher, network, decodes=decodes, images=form in _IMAGES)
        size = min(processes.gather(largest))  # one for all
    conditions = condition_index(teacher, classes)
    _say_uneven(chosen, len(conditions), kind_of(teacher))
    return Drawing(
        chosen=chosen,
        teacher=teacher,
        network=network,
        guidance=guidance if decodes else None,
        conditions=conditions,
        batch_size=size or 1,
        stream=stream,
    )


def draw(options: SampleOptions, progress_bar: ProgressBar) -> list[str]:
    """Sample and write; returns what was written, in lines.

    What can be refused is refused before anything is made: a batch is made, decoded, written and forgotten. Processes
    that are `together` share the batches.

    Raises:
        DDFastError: a folder or a file cannot be used, or what ended the writing early.
        ValueError, TypeError: an argument is out of range, or has no effect.
    """
    chosen = Choices.of(options)
    check(options, chosen)
    form, goal = chosen.format, options.to or options.student / f"samples-{options.steps}"
    target = processes.first_does(lambda: new_target(form, goal, continued=True))
    settings = settings_of(options, chosen)
    begun = processes.first_does(lambda: _begun_with(Kept(form, target), settings))
    drawing = opened(options, chosen, progress_bar, begun=begun)
    teacher, ranges = drawing.teacher, batch_ranges(chosen.count, drawing.batch_size)

    def names(batch: range) -> list[str]:
        number = torch.arange(batch.start, batch.stop, dtype=torch.int64)
        index = conditions_of(number, drawing.conditions, chosen.labels, options.seed).tolist()
        return [image_name(*sample, kind_of(teacher)) for sample in zip(batch, index, strict=True)]

    settings["batch_size"] = len(ranges[0])
    settings |= processes.first_does(lambda: of_networks(teacher, drawing.network, drawing.guidance))
    kept = Kept(form, target, settings)
    with kept.claimed():
        done = kept.whole(ranges, names)
        return save_stream(
            drawing.stream(batch_size=drawing.batch_size, skip=done),
            teacher,
            kept,
            quantise=chosen.quantise,
            size=chosen.resize,
            count=chosen.count,
            progress=progress_bar("samples"),
            there=sum(len(ranges[batch]) for batch in done),
        )


def settings_of(options: SampleOptions, chosen: Choices) -> dict[str, Any]:
    """What decides the samples, as far as the options say it."""
    settings = {**vars(chosen), "preset": options.preset, "classes": options.classes, "seed": options.seed}
    if options.preset:
        own = {name: getattr(options, name) for name in ("count", "labels", "quantise", "resize")}
        given = {name: value for name, value in own.items() if value is not None} | options.guidance.given()
        settings["changed"] = [f"{name} {value}" for name, value in given.items()]
    settings |= {"steps": options.steps, "teacher_steps": options.teacher_steps, "refine": options.refine}
    settings["device"] = torch.device(options.device).type
    if options.batch_size > 0 and chosen.count > 0:
        settings["batch_size"] = len(batch_ranges(chosen.count, options.batch_size)[0])
    return settings


def _begun_with(kept: Kept, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run to go on with, which are these as far as these go; empty: there is none."""
    if kept.form == "grid":
        return {}
    kept.check(settings)
    return kept.begun_with()


def of_networks(teacher: Teacher, student: Student | None, guidance: Guidance | None) -> dict[str, Any]:
    """What decides the samples beside the options: weights, captions, and what the networks are told.

    Args:
        teacher, student: that make them.
        guidance: of the teacher's part; None: it has none.
    """
    decided: dict[str, Any] = {"teacher": digest(teacher.state_dict())}
    if student is not None:
        decided["student"] = digest(student.state_dict())
        decided["split"] = student.split
        decided["point"] = student.point if isinstance(student, DD1Student) else None
    if guidance is not None:
        used = dataclasses.asdict(teacher.defaults) | guidance.given()
        decided |= {f"guidance.{name}": value for name, value in used.items()}
    if not teacher.num_classes:
        decided["captions"] = f"{teacher.num_conditions}, {_captions_digest(teacher)}"
    return decided


def _captions_digest(teacher: Teacher) -> str:
    """Twelve hex digits of all captions: of their texts where these are encoded on demand, else of their features."""
    texts = getattr(getattr(teacher, "captions", None), "texts", None)
    if texts is not None:
        return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:12]
    whole = hashlib.sha256()
    for some in torch.arange(teacher.num_conditions, dtype=torch.int64, device=teacher.codebook.device).split(64):
        made = teacher.condition_of(some)
        tensors = made if isinstance(made, tuple) else (made,)
        whole.update(digest({str(number): tensor for number, tensor in enumerate(tensors)}).encode())
    return whole.hexdigest()[:12]


def _guidance(options: SampleOptions, teacher: Teacher, decodes: bool) -> Guidance:
    """Settings of the teacher's part: a preset's too, which has none to give where the teacher takes no part."""
    if not options.preset:
        return options.guidance
    preset = get_preset(options.preset)
    preset.check(teacher)
    if not decodes:
        return options.guidance
    guidance, usual = preset.guidance(teacher, options.guidance), vars(preset.teacher(teacher))
    for name, value in options.guidance.given().items():
        _say_taken(f"guidance.{name}", value, usual[name], preset)
    return guidance


def _say_taken(name: str, value: object, usual: object, preset: Preset) -> None:
    """Say where the user's choice takes the place of a preset's."""
    if value != usual:
        has = "none" if usual is None else usual
        say(f"--{name.replace('_', '-')} {value} is taken; the preset {preset.name} has {has}")


def _say_uneven(chosen: Choices, conditions: int, kind: str) -> None:
    """Say where a judge would find more images of some classes than of others."""
    if chosen.count % conditions and chosen.labels == "uniform" and chosen.format in ("files", "npz"):
        fewer = chosen.count // conditions
        say(f"--count {chosen.count} is no multiple of {conditions}: {fewer} or {fewer + 1} images of each {kind}")


def check(options: SampleOptions, chosen: Choices) -> None:
    """Raise `DDFastError` for options that are out of range, or have no effect."""
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
    if chosen.resize < 0:
        raise DDFastError(f"--resize: got {chosen.resize}, expected a side in pixels, or 0 for the teacher's own")
    for name in ("quantise", "resize"):
        if chosen.format not in _IMAGES and getattr(options, name) is not None:
            raise DDFastError(f"--{name}: has no effect with --format {chosen.format}: there are no images")
    labels(options.classes)


def labels(text: str) -> tuple[int, ...] | None:
    """Class labels from "1,2,3"; None for an empty text."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else None
    except ValueError:
        raise DDFastError(f"--classes: got {text!r}, expected numbers separated by commas, such as 1,2,3") from None

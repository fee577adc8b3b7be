"""Images of a student, or of anyone, through an instrument of the field: what `ddfast evaluate --protocol` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from ddfast import env, processes
from ddfast.config import EvaluationConfig
from ddfast.drawing import Choices, DrawOptions, SampleOptions, check, of_networks, opened, settings_of
from ddfast.errors import DDFastError
from ddfast.evaluation.clip import Clip, ClipScore, FileScore
from ddfast.evaluation.images import Images, Pictured, open_images
from ddfast.evaluation.inception import Inception
from ddfast.evaluation.instruments import INCEPTIONS, OfInception
from ddfast.evaluation.judgements import Judgement, check_comparable, read_judgement, table, usual_count
from ddfast.evaluation.references import ReferenceFile, write_reference
from ddfast.files import check_new, file_sha256, write_atomically
from ddfast.messages import warn
from ddfast.models.caption_files import read_texts
from ddfast.pictures import stream_pictures
from ddfast.presets import get_preset
from ddfast.progress import ProgressBar
from ddfast.report import machine

_SUFFIXES = {"adm": ".npz", "dd1": ".pth", "clean": ".npz"}
"""Of a reference's file."""

Given = TypeVar("Given")


@dataclasses.dataclass(kw_only=True)
class EvaluateOptions(DrawOptions):
    """What to measure: a student beside its teacher and baselines, or with --protocol images as the field judges them.

    Attributes:
        student: folder of a training run, of `ddfast convert` or of `ddfast.hub`.
        evaluation: without --protocol: how many samples, and which batch sizes are timed; default: the run's.
        protocol: adm (OpenAI's evaluator: FID, sFID, Inception score, precision, recall), dd1 (pytorch-fid: FID) or
            clean (clean-fid: FID).
        reference: what images are compared with: adm's .npz file, dd1's statistic.pth, clean's .npz file.
        clip: beside --protocol, the CLIP score of images and --captions too: a folder with a CLIP model (as
            transformers keeps it), or a file with features (image_features and text_features).
        inception: the network's weights: weights-inception-2015-12-05-6726825d.pth.
        images: in place of a student, images that are there: an .npz file with arr_0, or a folder of PNG or JPG files;
            --preset and --labels then say how they were made.
        make_reference: in place of figures, write a reference of these images (an .npz file, a folder) to --to.
        to: the file of the reference that is made.
        beside: files of --json: the table has their rows too.
        json: file for the figures.
    """

    student: Path | None = None
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    protocol: Literal["adm", "dd1", "clean"] | None = None
    reference: Path | None = None
    clip: Path | None = None
    inception: Path | None = None
    images: Path | None = None
    make_reference: Path | None = None
    to: Path | None = None
    beside: tuple[Path, ...] = ()
    json: Path | None = None

    @property
    def judges(self) -> bool:
        """Whether an instrument of the field is asked for, or a table of what some have said."""
        return bool(self.protocol or self.images or self.make_reference or self.beside)


def without_effect(options: EvaluateOptions) -> dict[str, str]:
    """Flags that have no effect beside the others, and why, for `ddfast.cli.check_effect`."""
    drawn = [field.name.replace("_", "-") for field in dataclasses.fields(DrawOptions) if field.name != "device"]
    judged = ["protocol", "reference", "inception", "images", "beside", "clip"]
    if not options.judges:
        why = "it is for --protocol; a run's own figures have --evaluation.samples, --evaluation.batch-size"
        shared = ("captions", "caption", "text-encoder", "teacher", "tokenizer")
        ignored = dict.fromkeys((name for name in drawn if name not in shared), why)
        return ignored | {"to": "no --make-reference", "clip": why}
    ignored = {"evaluation": "it is of a run's own figures; --protocol has --count and --batch-size"}
    if options.make_reference:
        others = [*drawn, "reference", "images", "student", "beside", "json", "clip"]
        others.remove("seed")  # of the choice of images
        return ignored | dict.fromkeys(others, "--make-reference takes the images that it names")
    ignored["to"] = "only --make-reference writes there"
    if options.images:
        told = ["preset", "labels", *(["captions"] if options.clip else [])]
        ignored |= dict.fromkeys(
            (name for name in ["student", *drawn] if name not in told), "--images are there already"
        )
    elif not options.student:
        why = "there are neither --images nor a --student"
        ignored |= dict.fromkeys((name for name in [*judged, *drawn, "json"] if name != "beside"), why)
    return ignored


def judge(options: EvaluateOptions, progress_bar: ProgressBar) -> list[str]:
    """Measure, or make a reference, and write; returns a table, or what was written, in lines.

    What can be refused is refused before anything is computed. Processes that are `together` share the images.

    Raises:
        DDFastError: a file cannot be used, or holds figures of another instrument.
        ValueError, TypeError: an argument is out of range, or has no effect.
    """
    if options.make_reference:
        return _make_reference(options, options.make_reference, progress_bar)
    beside = [read_judgement(path) for path in options.beside]
    if not (options.images or options.student):
        return table(beside)
    target = options.json
    if target:
        processes.first_does(lambda: check_new(target, "--json"))
    instrument, inception = _instrument(options)
    path = _needed(options.reference, "reference")
    file = ReferenceFile(path, instrument.name)
    clip = Clip(options.clip, options.device) if options.clip and not options.clip.is_file() else None
    pictures, made = (_of_images if options.images else _of_student)(options, progress_bar)  # by what memory is left
    own = Judgement(
        instrument=instrument.name,
        figures={},
        inception=inception,
        reference=_said(path),
        versions={**machine(), "torch-fidelity": env.package_version("torch-fidelity")},
        **made,
    )
    check_comparable([own, *beside])
    if file.images and list(file.images.size) != own.size:
        ours, theirs = (" x ".join(map(str, size)) for size in (own.size, file.images.size))
        warn(f"the images are {ours} pixels, the reference's {theirs}: published figures are of equal sizes")
    score = _clip_score(options, clip, own.count) if options.clip else None
    if score:
        own.clip, pictures = score.said, score.along(pictures)
        check_comparable([own, *beside])
    against = file.seen_by(instrument, progress_bar("reference"))
    own.figures = instrument.figures(pictures, against, progress_bar("images"), count=own.count)
    if score:
        own.figures |= score.figures()
    if target:
        processes.first_does(lambda: write_atomically(target, own.text()))
    return table([own, *beside])


def _of_images(options: EvaluateOptions, progress_bar: ProgressBar) -> tuple[Iterable[Pictured], dict[str, Any]]:
    """Pictures that are there, and what a judgement says of them."""
    assert options.images is not None
    images = _opened(options.images, "--images", progress_bar)
    settings = images.settings()  # `ddfast sample` made them
    preset = options.preset or settings.get("preset", "")
    if settings and settings.get("count") != images.count:
        expected = f"{images.count} images of the {settings.get('count')} that `ddfast sample` was to make"
        raise DDFastError(f"--images {images.path}: holds {expected}: the same command makes the others")
    if settings and options.preset not in ("", settings.get("preset")):
        made = settings.get("preset") or "none"
        raise DDFastError(f"--preset {options.preset}: --images {images.path} were made with the preset {made}")
    if settings and options.labels not in (None, settings.get("labels")):
        made = settings.get("labels")
        raise DDFastError(f"--labels {options.labels}: --images {images.path} were made with {made} ones")
    _check_preset(preset, _needed(options.protocol, "protocol"))
    if options.preset:
        settings["labels"] = get_preset(preset).labels
    if options.labels:
        settings["labels"] = options.labels
    made = {"source": str(images.path), "count": images.count, "size": list(images.size)}
    return images.batches(), made | {"preset": preset, "settings": settings}


def _of_student(options: EvaluateOptions, progress_bar: ProgressBar) -> tuple[Iterable[Pictured], dict[str, Any]]:
    """Pictures that a student makes, and what a judgement says of them."""
    assert options.student is not None
    shared = {field.name: getattr(options, field.name) for field in dataclasses.fields(DrawOptions)}
    asked = SampleOptions(student=options.student, format="npz", **shared)
    if asked.count is None and not asked.preset:
        asked.count = usual_count(_needed(options.protocol, "protocol"))
    chosen = Choices.of(asked)
    check(asked, chosen)
    drawing = opened(asked, chosen, progress_bar)
    teacher = drawing.teacher
    settings = settings_of(asked, chosen)
    settings |= processes.first_does(lambda: of_networks(teacher, drawing.network, drawing.guidance))
    stream = drawing.stream(batch_size=drawing.batch_size)
    pictures = stream_pictures(stream, teacher, quantise=chosen.quantise, size=chosen.resize)
    nothing = torch.zeros(1, teacher.num_tokens, dtype=torch.int64, device=teacher.codebook.device)
    size = [chosen.resize] * 2 if chosen.resize else list(teacher.decode(nothing).shape[-2:])
    by = "the teacher" if asked.steps == 0 else f"{asked.steps} step{'s' if asked.steps > 1 else ''}"
    if asked.steps and asked.teacher_steps:
        by += f" and {asked.teacher_steps} of the teacher"
    if asked.steps and asked.refine:
        by += f", refined ({asked.refine})"
    made = {"source": f"{asked.student}, {by}", "count": chosen.count, "size": size}
    return pictures, made | {"preset": asked.preset, "settings": settings}


def _make_reference(options: EvaluateOptions, path: Path, progress_bar: ProgressBar) -> list[str]:
    target = _needed(options.to, "to")
    suffix = _SUFFIXES[_needed(options.protocol, "protocol")]
    if target.suffix != suffix:
        raise DDFastError(
            f"--to {target}: a reference of --protocol {options.protocol} has a name that ends in {suffix}"
        )
    processes.first_does(lambda: check_new(target, "--to"))
    images = _opened(path, "--make-reference", progress_bar, any_size=options.protocol == "clean")
    instrument, _ = _instrument(options)
    seen = instrument.see(images.batches(), progress_bar("images"), count=images.count, manifold=False)
    reference = seen.reference()
    kept = processes.first_does(lambda: write_reference(target, instrument.name, reference, images, options.seed))
    held = f", and {kept} of them for precision and recall" if kept else ""
    return [f"statistics of {images.count} images{held}: {target}"]


def _instrument(options: EvaluateOptions) -> tuple[OfInception, dict[str, str]]:
    """The instrument, and what a judgement says of its network."""
    instrument = INCEPTIONS[_needed(options.protocol, "protocol")]
    _check_preset(options.preset, instrument.name)
    path = _needed(options.inception, "inception")
    network = Inception(path, options.device)
    return instrument(network), {"file": path.name, "sha256": network.sha256}


def _check_preset(name: str, instrument: str) -> None:
    """Raise where a preset's table is by another instrument."""
    if name and get_preset(name).instrument != instrument:
        by = get_preset(name).instrument
        raise DDFastError(f"--preset {name}: its table is by --protocol {by}, not {instrument}")


def _clip_score(options: EvaluateOptions, clip: Clip | None, count: int) -> ClipScore | FileScore:
    """What scores the images by their captions, by a model or else a file; `count` is how many there are."""
    assert options.clip is not None
    if clip is None:
        return FileScore(options.clip, count)
    captions = read_texts(_needed(options.captions, "captions")) if not options.caption else list(options.caption)
    if options.images and len(captions) < count:
        raise DDFastError(f"--captions {options.captions}: has {len(captions)} captions, --images {count} images")
    return ClipScore(clip, captions)


def _opened(path: Path, option: str, progress_bar: ProgressBar, *, any_size: bool = False) -> Images:
    bar = progress_bar("headers")
    return processes.first_then_all(lambda: open_images(path, option, bar, any_size=any_size))


def _said(path: Path) -> dict[str, str]:
    """Name and content of a file."""
    return {"file": path.name, "sha256": processes.first_does(lambda: file_sha256(path))}


_WANTED = {
    "protocol": "adm, dd1 or clean, the instrument",
    "captions": "the captions that --clip compares the images with",
    "reference": "the file that images are compared with (docs/evaluation.md)",
    "inception": "the network's weights, weights-inception-2015-12-05-6726825d.pth (docs/evaluation.md)",
    "to": "the file of the reference",
}


def _needed(value: Given | None, option: str) -> Given:
    """What the user has given, or an error."""
    if value is None:
        raise DDFastError(f"--{option}: missing; give {_WANTED[option]}")
    return value

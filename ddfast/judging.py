"""Images of a student, or of anyone, through an instrument of the field: what `ddfast evaluate --protocol` does."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from ddfast import processes
from ddfast.config import EvaluationConfig
from ddfast.drawing import Choices, DrawOptions, SampleOptions, check, of_networks, opened, settings_of
from ddfast.errors import DDFastError
from ddfast.evaluation.images import Images, Pictured, open_images
from ddfast.evaluation.inception import Inception, file_sha256
from ddfast.evaluation.instruments import INCEPTIONS, OfInception
from ddfast.evaluation.judgements import Judgement, check_comparable, read_judgement, table
from ddfast.evaluation.references import ReferenceFile, write_reference
from ddfast.files import check_new, write_atomically
from ddfast.messages import warn
from ddfast.pictures import stream_pictures
from ddfast.presets import get_preset
from ddfast.progress import ProgressBar
from ddfast.report import machine
from ddfast.runs import read_json
from ddfast.saving import SETTINGS

_COUNT = 50_000
"""Images that a student is asked for, as everybody's figures are of."""

_SUFFIXES = {"adm": ".npz", "dd1": ".pth"}
"""Of a reference's file."""

Given = TypeVar("Given")


@dataclasses.dataclass(kw_only=True)
class EvaluateOptions(DrawOptions):
    """What to measure: a student beside its teacher and baselines, or with --protocol images as the field judges them.

    Attributes:
        student: folder of a training run, of `ddfast convert` or of `ddfast.hub`.
        evaluation: without --protocol: how many samples, and which batch sizes are timed; default: the run's.
        protocol: adm (OpenAI's evaluator: FID, sFID, Inception score, precision, recall) or dd1 (pytorch-fid: FID).
        reference: what images are compared with: adm's .npz file, dd1's statistic.pth.
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
    protocol: Literal["adm", "dd1"] | None = None
    reference: Path | None = None
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
    judged = ["protocol", "reference", "inception", "images", "beside"]
    if not options.judges:
        why = "it is for --protocol; a run's own figures have --evaluation.samples, --evaluation.batch-size"
        shared = ("captions", "caption", "text-encoder")
        return dict.fromkeys((name for name in drawn if name not in shared), why) | {"to": "no --make-reference"}
    ignored = {"evaluation": "it is of a run's own figures; --protocol has --count and --batch-size"}
    if options.make_reference:
        others = [*drawn, "reference", "images", "student", "beside", "json"]
        others.remove("seed")  # of the choice of images
        return ignored | dict.fromkeys(others, "--make-reference takes the images that it names")
    ignored["to"] = "only --make-reference writes there"
    if options.images:
        ignored |= dict.fromkeys(
            (name for name in ["student", *drawn] if name not in ("preset", "labels")), "--images are there already"
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
    pictures, made = (_of_images if options.images else _of_student)(options, progress_bar)
    own = Judgement(
        instrument=instrument.name,
        figures={},
        inception=inception,
        reference=_said(path),
        versions={**machine(), "torch-fidelity": importlib.metadata.version("torch-fidelity")},
        **made,
    )
    check_comparable([own, *beside])
    if file.images and list(file.images.size) != own.size:
        ours, theirs = (" x ".join(map(str, size)) for size in (own.size, file.images.size))
        warn(f"the images are {ours} pixels, the reference's {theirs}: published figures are of equal sizes")
    against = file.seen_by(instrument, progress_bar("reference"))
    own.figures = instrument.figures(pictures, against, progress_bar("images"), count=own.count)
    if target:
        processes.first_does(lambda: write_atomically(target, own.text()))
    return table([own, *beside])


def _of_images(options: EvaluateOptions, progress_bar: ProgressBar) -> tuple[Iterable[Pictured], dict[str, Any]]:
    """Pictures that are there, and what a judgement says of them."""
    assert options.images is not None
    images = _opened(options.images, "--images", progress_bar)
    beside = images.path / SETTINGS
    settings = read_json(beside) if beside.is_file() else {}  # `ddfast sample` made them
    preset = options.preset or settings.get("preset", "")
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
        asked.count = _COUNT
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
    images = _opened(path, "--make-reference", progress_bar)
    instrument, _ = _instrument(options)
    seen = instrument.see(images.batches(), progress_bar("images"), count=images.count, manifold=False)
    reference = seen.reference()
    kept = processes.first_does(lambda: write_reference(target, instrument.name, reference, images, options.seed))
    held = f", and {kept} of them for precision and recall" if kept else ""
    return [f"statistics of {images.count} images{held}: {target}"]


def _instrument(options: EvaluateOptions) -> tuple[OfInception, dict[str, str]]:
    """The instrument, and what a judgement says of its network."""
    instrument = INCEPTIONS[_needed(options.protocol, "protocol")]
    if options.preset and get_preset(options.preset).instrument != instrument.name:
        by = get_preset(options.preset).instrument
        raise DDFastError(f"--preset {options.preset}: its table is by --protocol {by}, not {instrument.name}")
    path = _needed(options.inception, "inception")
    network = Inception(path, options.device)
    return instrument(network), {"file": path.name, "sha256": network.sha256}


def _opened(path: Path, option: str, progress_bar: ProgressBar) -> Images:
    bar = progress_bar("headers")
    return processes.first_then_all(lambda: open_images(path, option, bar))


def _said(path: Path) -> dict[str, str]:
    """Name and content of a file."""
    return {"file": path.name, "sha256": processes.first_does(lambda: file_sha256(path))}


_WANTED = {
    "protocol": "adm or dd1, the instrument",
    "reference": "the file that images are compared with (docs/evaluation.md)",
    "inception": "the network's weights, weights-inception-2015-12-05-6726825d.pth (docs/evaluation.md)",
    "to": "the file of the reference",
}


def _needed(value: Given | None, option: str) -> Given:
    """What the user has given, or an error."""
    if value is None:
        raise DDFastError(f"--{option}: missing; give {_WANTED[option]}")
    return value

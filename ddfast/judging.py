"""Images of a student, or of anyone, through an instrument of the field: what `ddfast evaluate --protocol` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch

from ddfast import processes
from ddfast.config import EvaluationConfig
from ddfast.drawing import DrawOptions, Drawn, SampleOptions, opened
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

_COUNT = 50_000
"""Images that a student is asked for, as everybody's figures are of."""

_REFERENCES = {"adm": ".npz", "dd1": ".pth"}


@dataclasses.dataclass(kw_only=True)
class EvaluateOptions(DrawOptions):
    """What to measure: a student beside its teacher and the baselines; with --protocol, images as the field judges them.

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
    _check_preset(options)
    instrument, inception = _instrument(options)
    path = _needed(options.reference, "reference")
    file = ReferenceFile(path, instrument.name)
    if options.images:
        images = processes.first_then_all(lambda: open_images(_given(options.images), "--images"))
        pictures, made = _of_images(options, images)
    else:
        pictures, made = _of_student(options, progress_bar)
    own = Judgement(
        instrument=instrument.name,
        figures={},
        inception=inception,
        reference=_said(path),
        preset=options.preset,
        versions=machine() | {"torch-fidelity": Inception.version()},
        **made,
    )
    check_comparable([own, *beside])
    if file.images and file.images.size != tuple(own.size):
        sizes = " x ".join(map(str, own.size)), " x ".join(map(str, file.images.size))
        warn(f"the images are {sizes[0]} pixels and the reference's {sizes[1]}: published figures are of equal sizes")
    against = file.seen_by(instrument, progress_bar("reference"))
    bar = progress_bar("images")
    own.figures = instrument.figures(pictures, against, bar, count=own.count)
    if target:
        processes.first_does(lambda: write_atomically(target, own.text()))
    return table([own, *beside])


def _of_images(options: EvaluateOptions, images: Images) -> tuple[Iterable[Pictured], dict[str, Any]]:
    """Pictures that are there, and what a judgement says of them."""
    settings = {"labels": options.labels} if options.labels else {}
    if options.preset and not options.labels:
        settings = {"labels": get_preset(options.preset).labels}
    said = {"source": str(images.path), "count": images.count, "size": images.size, "settings": settings}
    return images.batches(), said


def _of_student(options: EvaluateOptions, progress_bar: ProgressBar) -> tuple[Iterable[Pictured], dict[str, Any]]:
    """Pictures that a student makes, and what a judgement says of them."""
    shared = {field.name: getattr(options, field.name) for field in dataclasses.fields(DrawOptions)}
    asked = SampleOptions(student=_given(options.student), format="npz", **shared)
    if asked.count is None and not asked.preset:
        asked.count = _COUNT
    drawn = opened(asked, progress_bar)
    chosen = drawn.chosen
    pictures = stream_pictures(drawn.batches(), drawn.teacher, quantise=chosen.quantise, size=chosen.resize)
    said = {"source": f"{asked.student}, {_steps(drawn)}", "count": chosen.count, "settings": drawn.settings}
    return pictures, said | {"size": drawn.size}


def _make_reference(options: EvaluateOptions, path: Path, progress_bar: ProgressBar) -> list[str]:
    target = _needed(options.to, "to", "the file of the reference")
    suffix = _REFERENCES[_needed(options.protocol, "protocol", "adm or dd1: what the reference is for")]
    if target.suffix != suffix:
        raise DDFastError(f"--to {target}: a reference of --protocol {options.protocol} ends in {suffix}")
    processes.first_does(lambda: check_new(target, "--to"))
    images = processes.first_then_all(lambda: open_images(path, "--make-reference"))
    instrument, _ = _instrument(options)
    seen = instrument.see(images.batches(), progress_bar("images"), count=images.count, manifold=False)
    reference = seen.reference()
    kept = processes.first_does(lambda: write_reference(target, instrument.name, reference, images, options.seed))
    held = f", with {kept} of them for precision and recall" if kept else ""
    return [f"reference of {images.count} images{held}: {target}"]


def _instrument(options: EvaluateOptions) -> tuple[OfInception, dict[str, str]]:
    """The instrument, and what a judgement says of its network."""
    protocol = _needed(options.protocol, "protocol", "adm or dd1")
    path = _needed(options.inception, "inception")
    network = Inception(path, options.device)
    return INCEPTIONS[protocol](network), {"file": path.name, "sha256": network.sha256}

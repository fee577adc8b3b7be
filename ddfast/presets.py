"""How published tables of ImageNet at 256 pixels were made, by name: labels, guidance, filters, quantisation, resizing.

Two tables made in different ways, or judged by different instruments, do not compare. Facts are those of the projects'
sampling scripts and READMEs (VAR, LlamaGen, Distilled Decoding 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from ddfast.errors import DDFastError
from ddfast.models import families
from ddfast.models.llamagen.network import LLAMAGEN_SIZES, LlamaGenTeacher
from ddfast.models.protocol import Teacher
from ddfast.sampling import Guidance


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How the images of a published table are made, and what judges them.

    Attributes:
        name: of the preset.
        instrument: adm (OpenAI's evaluator) or dd1 (pytorch-fid).
        families: of teachers that it is for, by name.
        teacher: settings of a teacher of theirs where it takes part. Filters without a scale: for its size, none is
            published.
        labels: uniform (as many of every class, in turn) or random.
        quantise: how values become 8 bits (`ddfast.pictures.pixels`).
        size: side in pixels that images are resized to; 0: as the teacher makes them.
        count: of images.
    """

    name: str
    instrument: str
    families: tuple[str, ...]
    teacher: Callable[[Teacher], Guidance]
    labels: str
    quantise: str
    size: int = 0
    count: int = 50_000

    def check(self, teacher: Teacher) -> None:
        """Raise `DDFastError` unless the preset is for teachers like this one."""
        family = families.of_teacher(teacher)
        if family.name not in self.families:
            titles = " and ".join(str(families.named(name, "presets")) for name in self.families)
            raise DDFastError(f"--preset {self.name}: is for {titles} teachers, and this is one of the family {family}")
        if not teacher.num_classes:
            raise DDFastError(f"--preset {self.name}: is for teachers of class labels, and this one takes captions")

    def guidance(self, teacher: Teacher, given: Guidance | None = None) -> Guidance:
        """Settings of the teacher's part: the given ones, and the preset's for those that are None.

        A student's own steps know none: this is for samplings in which the teacher takes part
        (`ddfast.sampling.teacher_takes_part`).

        Raises:
            DDFastError: the preset is for other teachers, or no scale is published for this one's size.
        """
        self.check(teacher)
        given, published = given or Guidance(), self.teacher(teacher)
        if published.top_k is not None and published.cfg_scale is None and given.cfg_scale is None:
            what = "no scale of guidance is published for a teacher of this size"
            raise DDFastError(f"--preset {self.name}: {what}; give --guidance.cfg-scale")
        return dataclasses.replace(published, **given.given())


_LLAMAGEN_SCALES = {"B": 2.0, "L": 2.0, "XL": 1.75, "XXL": 1.75, "3B": 1.65}


def _llamagen(teacher: Teacher) -> Guidance:
    """Every code that the teacher has, by its probability."""
    assert isinstance(teacher, LlamaGenTeacher)
    own = (teacher.sizes.dim, teacher.sizes.n_layer)
    scales = {(LLAMAGEN_SIZES[n].dim, LLAMAGEN_SIZES[n].n_layer): scale for n, scale in _LLAMAGEN_SCALES.items()}
    return Guidance(cfg_scale=scales.get(own), temperature=1.0, top_k=0, top_p=1.0)


def _var(name: str, cfg_scale: float) -> Preset:
    settings = Guidance(cfg_scale=cfg_scale, temperature=1.0, top_k=900, top_p=0.96)
    return Preset(
        name=name, instrument="adm", families=("var",), teacher=lambda _: settings, labels="uniform", quantise="var"
    )


_ALL = (
    _var("var-readme", 1.5),
    _var("var-paper", 2.0),
    Preset(
        name="llamagen",
        instrument="adm",
        families=("llamagen",),
        teacher=_llamagen,
        labels="random",
        quantise="llamagen",
        size=256,
    ),
    Preset(
        name="dd1",
        instrument="dd1",
        families=("var", "llamagen"),
        teacher=lambda _: Guidance(),
        labels="random",
        quantise="dd1",
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}
"""The presets by name; dd1 leaves a teacher's settings as they are: they are what its students learnt."""


def get_preset(name: str) -> Preset:
    """The preset of a name; a `DDFastError` where there is none."""
    if name not in PRESETS:
        raise DDFastError(f"--preset: got {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]

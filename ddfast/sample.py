"""`ddfast sample`: images or codes from a distilled student."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ddfast import cli
from ddfast.pipeline import open_student, open_teacher
from ddfast.report import save_samples
from ddfast.sampling import Guidance, sample_student

EXAMPLES = """  python -m ddfast.sample --student runs/digits --steps 2 --classes 1,2,3 --count 12
  python -m ddfast.sample --student runs/digits --teacher-steps 4 --format files --to images
  python -m ddfast.sample --student runs/digits --format codes --count 1000
  python -m ddfast.sample --student var-d16 --steps 0 --guidance.cfg-scale 4 --guidance.top-p 0.96 --classes 207"""


@dataclasses.dataclass(kw_only=True)
class SampleOptions:
    """What to draw and how.

    Attributes:
        student: folder of a training run, of `ddfast convert` or of `ddfast.hub`.
        steps: DD1: 1 or 2 passes; DD2: one pass, then steps - 1 groups of the teacher's; 0: the teacher, step by step.
        teacher_steps: groups that the teacher regenerates between the passes (from the second step's point on).
        point: where the second step starts; default: where it was trained.
        guidance: settings of the teacher's part; default: those that the student learnt.
        classes: labels separated by commas; empty: all of them in turn.
        count: how many samples.
        seed: of the noise.
        format: one grid, one png per image, or the codes as safetensors.
        to: where the result goes; default: samples-STEPS in the student's folder.
        device: where to run.
    """

    student: Path
    steps: int = 1
    teacher_steps: int = 0
    point: int | None = None
    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    classes: str = ""
    count: int = 64
    seed: int = 0
    format: Literal["grid", "files", "codes"] = "grid"
    to: Path | None = None
    device: str = "cpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def body(rest: list[str]) -> None:
        options = cli.parse_plain("sample", SampleOptions, rest, EXAMPLES)
        opening = (options.student, options.device, cli.progress_bar("teacher"))
        config, teacher, *student = open_student(*opening) if options.steps else open_teacher(*opening)
        samples = sample_student(
            teacher,
            student[0] if student else None,
            count=options.count,
            seed=options.seed,
            classes=cli.labels(options.classes),
            steps=options.steps,
            point=options.point or config.dd1.point,
            teacher_steps=options.teacher_steps,
            guidance=options.guidance,
        )
        target = options.to or options.student / f"samples-{options.steps}"
        for line in save_samples(samples, teacher, options.format, target):
            print(line)

    return cli.run("sample", body, arguments)


if __name__ == "__main__":
    sys.exit(main())

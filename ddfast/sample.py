"""`ddfast sample`: images or codes from a distilled student."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from ddfast import cli
from ddfast.config import require_seed
from ddfast.drawing import draw
from ddfast.sampling import Guidance

EXAMPLES = """  python -m ddfast.sample --student runs/digits --steps 2 --classes 1,2,3 --count 12
  python -m ddfast.sample --student runs/digits --teacher-steps 4 --format files --to images
  python -m ddfast.sample --student runs/digits --format codes --count 1000
  python -m ddfast.sample --student t2i --caption "a red bird on a branch" --caption "two dogs" --count 4
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
        classes: labels (text: numbers of captions) separated by commas; empty: all of them in turn.
        captions: for a text model: file with features (`save_captions`), or with a caption in every line.
        caption: for a text model: a caption; may be given several times.
        text_encoder: name or folder of the T5 that encodes captions given as text; default: google/flan-t5-xl.
        count: how many samples.
        seed: of all chance, 0 to 2^64 - 1; sample i of a seed is the same whatever the count and the batch size.
        batch_size: samples made and written at a time; 0: as many as free memory holds.
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def body(rest: list[str]) -> None:
        options = vars(cli.parse_plain("sample", SampleOptions, rest, EXAMPLES))
        options["classes"] = cli.labels(options["classes"])
        print("\n".join(draw(**options, progress_bar=cli.progress_bar)))

    return cli.run("sample", body, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""`ddfast convert`: official VAR, LlamaGen and DD1 checkpoints to safetensors and back."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ddfast import cli
from ddfast.converting import convert

EXAMPLES = """  python -m ddfast.convert --teacher var_d16.pth --tokenizer vae_ch160v4096z32.pth --to var-d16
  python -m ddfast.convert --teacher c2i_L_256.pt --tokenizer vq_ds16_c2i.pt --student LlamaGen-DD-L.pt --to dd-l
  python -m ddfast.convert --teacher var-d16 --to official --form official"""


@dataclasses.dataclass(kw_only=True)
class ConvertOptions:
    """What to convert.

    Attributes:
        teacher: a teacher's checkpoint: official, or a folder that this command wrote.
        to: folder for the result.
        tokenizer: its tokenizer's checkpoint, if the teacher's file does not hold it.
        student: a DD1 student of this teacher, converted with it; default: the one in the teacher's folder.
        point: where the student's second step starts (VAR-d16: 5, d20 and d24: 4, LlamaGen: 80), for `ddfast sample`.
        split: group from which its samples are the continuous head's (as point; LlamaGen-L: 130).
        form: ddfast (safetensors with settings and config.json) or official (what the official repositories load).
        n_head: query heads of a LlamaGen of no published size.
        image_size: pixels of a LlamaGen checkpoint whose name does not say it.
        patch_nums: scales of a VAR checkpoint that does not hold them.
    """

    teacher: Path
    to: Path
    tokenizer: Path | None = None
    student: Path | None = None
    point: int | None = None
    split: int | None = None
    form: Literal["ddfast", "official"] = "ddfast"
    n_head: int | None = None
    image_size: int | None = None
    patch_nums: tuple[int, ...] | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def body(rest: list[str]) -> None:
        options = cli.parse_plain("convert", ConvertOptions, rest, EXAMPLES)
        given = {name: getattr(options, name) for name in ("n_head", "image_size", "patch_nums")}
        config = {name: value for name, value in given.items() if value is not None}
        about = {"point": options.point, "split": options.split}
        files = (options.teacher, options.tokenizer, options.student)
        for line in convert(*files, options.to, form=options.form, config=config, about_student=about):
            print(line)

    return cli.run("convert", body, arguments)


if __name__ == "__main__":
    sys.exit(main())

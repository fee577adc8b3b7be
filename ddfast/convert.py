"""`ddfast convert`: official VAR, LlamaGen and DD1 checkpoints to safetensors and back."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from ddfast import cli
from ddfast.models.converting import Told, convert

EXAMPLES = """  python -m ddfast.convert --teacher var_d16.pth --tokenizer vae_ch160v4096z32.pth --to var-d16
  python -m ddfast.convert --teacher c2i_L_256.pt --tokenizer vq_ds16_c2i.pt --student LlamaGen-DD-L.pt --to dd-l
  python -m ddfast.convert --teacher var-d16 --to official --form official"""


@dataclasses.dataclass(kw_only=True)
class ConvertOptions(Told):
    """What to convert.

    Attributes:
        teacher: a teacher's checkpoint: official, or a folder that this command wrote.
        to: folder for the result.
        tokenizer: its tokenizer's checkpoint, if the teacher's file does not hold it.
        student: a DD1 or DD2 student of this teacher, converted with it; default: the one in the teacher's folder.
        point: where the student's second step starts (VAR-d16: 5, d20 and d24: 4, LlamaGen: 80), for `ddfast sample`.
        split: group from which its samples are the continuous head's (as point; LlamaGen-L: 130).
        ema: take the student's averaged weights, the live ones beside them; else the live ones alone.
        teacher_ema: take the teacher's averaged weights, where its file has them.
        dtype: of the teacher's transformer; default: as stored.
        form: ddfast (safetensors with settings and config.json) or official (what the official repositories load).
    """

    teacher: Path
    to: Path
    tokenizer: Path | None = None
    student: Path | None = None
    point: int | None = None
    split: int | None = None
    ema: bool = True
    teacher_ema: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    form: Literal["ddfast", "official"] = "ddfast"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def body(rest: list[str]) -> None:
        options = cli.parse_plain("convert", ConvertOptions, rest, EXAMPLES)
        config = {**options.told(), "ema": options.teacher_ema}
        config["dtype"] = getattr(torch, options.dtype) if options.dtype else None
        about = {"point": options.point, "split": options.split}
        files = (options.teacher, options.tokenizer, options.student)
        done = convert(*files, options.to, form=options.form, config=config, about_student=about, ema=options.ema)
        print("\n".join(done))

    return cli.run("convert", body, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""Checkpoints from one layout to the other; see `ddfast convert`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ddfast.errors import DDFastError
from ddfast.files import write_atomically
from ddfast.messages import say
from ddfast.models.exporting import export_student, export_teacher, untold
from ddfast.models.loading import (
    load_teacher,
    read_students,
    save_student,
    save_teacher,
    student_from,
    teacher_config,
)
from ddfast.models.official import CONFIG_FILE, STUDENT_FILE, TEACHER_FILE, choose
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student

_OFFICIAL = {"teacher.pth", "tokenizer.pth", "student.pth"}


@dataclasses.dataclass(kw_only=True)
class Told:
    """What the teacher's file does not tell, by official names; what it does tell must agree.

    Attributes:
        family: var or llamagen, where the tensors do not show it.
        image_size: pixels (LlamaGen).
        block_size: image tokens, instead (LlamaGen).
        n_head: query heads (LlamaGen of no published size).
        n_kv_head: key and value heads (LlamaGen).
        num_classes: of labels.
        class_dropout_prob: 0: there is no label for "no condition" (LlamaGen).
        cls_token_num: tokens of a caption (LlamaGen).
        rope_base: of the rotary embedding (LlamaGen).
        codebook_l2_norm: codes are compared by direction (LlamaGen).
        norm_eps: of every norm.
        num_heads: attention heads (VAR without l2 norm).
        patch_nums: scales (VAR).
        quant_resi: weight of the tokenizer's phi (VAR).
        using_znorm: codes are compared by direction (VAR).
    """

    family: str | None = None
    image_size: int | None = None
    block_size: int | None = None
    n_head: int | None = None
    n_kv_head: int | None = None
    num_classes: int | None = None
    class_dropout_prob: float | None = None
    cls_token_num: int | None = None
    rope_base: float | None = None
    codebook_l2_norm: bool | None = None
    norm_eps: float | None = None
    num_heads: int | None = None
    patch_nums: tuple[int, ...] | None = None
    quant_resi: float | None = None
    using_znorm: bool | None = None

    def told(self) -> dict[str, Any]:
        """The settings that the user gave, as `load_teacher` takes them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(Told)}
        return {name: value for name, value in values.items() if value is not None}


def convert(
    teacher: Path,
    tokenizer: Path | None,
    student: Path | None,
    to: Path,
    *,
    form: str,
    config: dict[str, Any],
    about_student: dict[str, Any],
    ema: bool = True,
) -> list[str]:
    """Read a teacher, and a student if one is given, and write them to the folder `to`; returns what was written.

    Args:
        teacher, tokenizer, config: as in `load_teacher`.
        student: as in `load_student`; None: the one in the folder `teacher`, if there is one.
        to: folder of the result; what it holds is not overwritten.
        form: "ddfast": model.safetensors, config.json and student.safetensors; "official": the checkpoints that the
            official repositories load.
        about_student: `point` and `split`, kept beside the student; None: what its file says.
        ema: write the averaged weights of the student, with the live ones beside them; False: the live ones alone.

    Raises:
        DDFastError: a file cannot be read or does not fit, `to` holds a result already, or a setting of the student is
            given without one.
    """
    names = {TEACHER_FILE, CONFIG_FILE, STUDENT_FILE} if form == "ddfast" else _OFFICIAL
    there = sorted(name for name in names if (to / name).exists())
    if there:
        raise DDFastError(f"--to {to}: {', '.join(there)} exists; choose another folder")
    if student is None and (teacher / STUDENT_FILE).is_file():
        student = teacher / STUDENT_FILE
    told = [name for name, value in about_student.items() if value is not None] + ([] if ema else ["no-ema"])
    if told and student is None:
        raise DDFastError(f"--{told[0]}: has no effect without --student")
    source = load_teacher(teacher, tokenizer, **config)
    made: Student | None = None
    live: dict[str, Any] | None = None
    about: dict[str, Any] = {}
    if student is not None:
        made, live, about = _students(student, source, about_student, ema)
    if form == "official":
        if told and told != ["no-ema"]:
            raise DDFastError(f"--{told[0]}: the official layout has no place for it")
        if made is not None:  # first: DD2's networks have no official layout
            export_student(made, to / "student.pth", live=live)
        export_teacher(source, to / "teacher.pth", to / "tokenizer.pth")
        for line in untold(source):
            say(line)
    else:
        about_teacher = json.dumps(teacher_config(source), indent=2, default=list) + "\n"
        save_teacher(to / TEACHER_FILE, source)
        write_atomically(to / CONFIG_FILE, about_teacher)
        if made is not None:
            save_student(to / STUDENT_FILE, made, about, live=live)
    return [
        f"{to / name}: {(to / name).stat().st_size / 2**20:.1f} MiB" for name in sorted(names) if (to / name).exists()
    ]


def _students(
    path: Path, teacher: Teacher, about: dict[str, Any], ema: bool
) -> tuple[Student, dict[str, Any] | None, dict[str, Any]]:
    """The student to write, the weights without averaging where the file has both, and what else its file says.

    Raises:
        DDFastError: `point` or `split` is no group of the teacher's.
    """
    count = len(teacher.groups)
    for name, least, most in (("point", 1, count - 1), ("split", 0, count)):
        value = about[name]
        if value is not None and not least <= value <= most:
            raise DDFastError(f"--{name}: got {value}, expected a group in {least}..{most} of this teacher")
    file, found, header = read_students(path)
    chosen = choose(found, "student", file, averaged=ema, strict=not ema, silent=bool(header))
    made = student_from(chosen, file, header, teacher)
    made.split = made.split if about["split"] is None else about["split"]
    others = [one for one in found if one.kind == chosen.kind and not one.averaged]
    live = None
    if chosen.averaged and others:
        live = dict(student_from(choose(others, "student", file, silent=True), file, header, teacher).state_dict())
    kept = {name: value for name, value in header.items() if name not in ("method", "student", "split")}
    return made, live, {**kept, "point": kept.get("point") if about["point"] is None else about["point"]}

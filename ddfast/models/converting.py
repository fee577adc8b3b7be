"""Checkpoints from one layout to the other; see `ddfast convert`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast.errors import DDFastError
from ddfast.files import whole_folder, write_atomically
from ddfast.messages import say
from ddfast.models import families
from ddfast.models.checkpoint import storable
from ddfast.models.loading import load_teacher, read_students, save_student, save_teacher, student_from
from ddfast.models.official import CONFIG_FILE, STUDENT_FILE, TEACHER_FILE, choose
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.portable import portable

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
        with whole_folder(to, last="teacher.pth") as folder:
            if made is not None:  # first: DD2's networks have no official layout
                export_student(made, folder / "student.pth", live=live)
            export_teacher(source, folder / "teacher.pth", folder / "tokenizer.pth")
        for line in untold(source):
            say(line)
    else:
        family = families.of_teacher(source)
        about_teacher = json.dumps({"family": family.name, **family.describe(source)}, indent=2, default=list) + "\n"
        with whole_folder(to, last=CONFIG_FILE) as folder:
            save_teacher(folder / TEACHER_FILE, source)
            write_atomically(folder / CONFIG_FILE, about_teacher)
            if made is not None:
                save_student(folder / STUDENT_FILE, made, about, live=live)
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
    file, found, header = read_students(path, teacher)
    chosen = choose(found, "student", file, averaged=ema, strict=not ema, silent=bool(header))
    made = student_from(chosen, file, header, teacher)
    for name, value in about.items():
        if value is not None and name not in made.header():
            raise DDFastError(f"--{name}: has no effect: a {made.method.upper()} student has none")
        if value is not None:
            setattr(made, name, value)
    others = [one for one in found if one.kind == chosen.kind and not one.averaged]
    live = None
    if chosen.averaged and others:
        live = dict(student_from(choose(others, "student", file, silent=True), file, header, teacher).state_dict())
    written = {"method", "student", *made.header()}
    return made, live, {name: portable(value) for name, value in header.items() if name not in written}


def export_teacher(teacher: Teacher, weights: Path, tokenizer: Path) -> None:
    """Write a VAR or LlamaGen teacher and its tokenizer as two official checkpoints.

    Raises:
        DDFastError: the teacher is of another family, which has no official layout.
    """
    of_teacher, of_tokenizer = families.of_teacher(teacher).official_teacher(teacher)
    _save(weights, of_teacher)
    _save(tokenizer, of_tokenizer)


def export_student(student: Student, weights: Path, *, live: dict[str, Tensor] | None = None) -> None:
    """Write a VAR or LlamaGen student as an official checkpoint.

    Args:
        student: carries the averaged weights.
        weights: the file.
        live: the weights without averaging; None: the averaged ones stand in both places.

    Raises:
        DDFastError: the student is of another family, which has no official layout.
    """
    averaged = storable(student.state_dict())
    current = averaged if live is None else storable(live)
    _save(weights, families.of_teacher(student.teacher).official_student(student, averaged, current))


def untold(teacher: Teacher) -> list[str]:
    """What official checkpoints have no place for, and what the official code must be told to run this teacher."""
    unusual = families.of_teacher(teacher).unusual(teacher)
    other = [f"{name}={value}" for name, value in unusual.items()]
    if not other:
        return []
    return [f"official files do not say it, so tell the official code (and ddfast): {', '.join(other)}"]


def _save(path: Path, content: dict[str, Any]) -> None:
    write_atomically(Path(path), lambda file: torch.save(content, file))

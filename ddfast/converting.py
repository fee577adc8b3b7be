"""Checkpoints from one layout to the other; see `ddfast convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ddfast.errors import DDFastError
from ddfast.files import write_atomically
from ddfast.models.exporting import export_student, export_teacher
from ddfast.models.loading import (
    load_student,
    load_teacher,
    save_student,
    save_teacher,
    teacher_config,
)
from ddfast.models.official import STUDENT_FILE, TEACHER_FILE


def convert(
    teacher: Path,
    tokenizer: Path | None,
    student: Path | None,
    to: Path,
    *,
    form: str,
    config: dict[str, Any],
    about_student: dict[str, Any],
) -> list[str]:
    """Read a teacher, and a student if one is given, and write them to the folder `to`; returns what was written.

    Args:
        teacher, tokenizer, config: as in `load_teacher`.
        student: as in `load_student`; None: the one in the folder `teacher`, if there is one.
        to: folder of the result; what it holds is not overwritten.
        form: "ddfast": model.safetensors, config.json and student.safetensors; "official": the checkpoints that the
            official repositories load.
        about_student: `point` and `split`, kept beside the student; None: unknown.

    Raises:
        DDFastError: a file cannot be read or does not fit, or `to` holds a result already.
    """
    names = {TEACHER_FILE, "config.json", STUDENT_FILE} if form == "ddfast" else _OFFICIAL
    there = sorted(name for name in names if (to / name).exists())
    if there:
        raise DDFastError(f"--to {to}: {', '.join(there)} exists; choose another folder")
    if student is None and (teacher / STUDENT_FILE).is_file():
        student = teacher / STUDENT_FILE
    source = load_teacher(teacher, tokenizer, **config)
    made = None if student is None else load_student(student, source)
    live = None if student is None else _live(student, source)
    if form == "official":
        if made is not None:  # first: DD2's networks have no official layout
            export_student(made, to / "student.pth", live=live)
        export_teacher(source, to / "teacher.pth", to / "tokenizer.pth")
    else:
        about_teacher = json.dumps(teacher_config(source), indent=2, default=list) + "\n"
        save_teacher(to / TEACHER_FILE, source)
        write_atomically(to / "config.json", about_teacher)
        if made is not None:
            made.split = made.split if about_student["split"] is None else about_student["split"]
            save_student(to / STUDENT_FILE, made, {"point": about_student["point"]}, live=live)
    return [
        f"{to / name}: {(to / name).stat().st_size / 2**20:.1f} MiB" for name in sorted(names) if (to / name).exists()
    ]


_OFFICIAL = {"teacher.pth", "tokenizer.pth", "student.pth"}


def _live(student: Path, teacher: Any) -> dict[str, Any] | None:
    """The weights without averaging, where the file has them."""
    try:
        return dict(load_student(student, teacher, ema=False).state_dict())
    except DDFastError:
        return None

"""Teachers and students from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddfast.errors import DDFastError
from ddfast.models.checkpoint import load_state, load_tensors, save_tensors
from ddfast.models.digits import load_digits_teacher
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student

STUDENT_FILE = "student.safetensors"

_AVERAGE = "ema."
"""Prefix of the averaged weights in a student's file, beside the live ones."""


def load_teacher(
    weights: str | Path, tokenizer: str | Path | None = None, *, family: str | None = None, **config: Any
) -> Teacher:
    """A teacher from its file, its family recognised from what the file says of itself.

    Args:
        weights: a safetensors file written by ddfast.
        tokenizer: None; the digits teacher's file holds its tokenizer.
        family: "digits", or None to recognise it.
        config: what a family's file cannot tell; the digits teacher's file tells everything.

    Raises:
        DDFastError: the file is missing or damaged, holds no teacher of a known family, or `config` has a key that the
            family does not know.
    """
    _, header = load_tensors(Path(weights))
    found = family or header.get("family")
    if found != "digits":
        raise DDFastError(f"{weights}: family {found!r} is not known; this version knows: digits")
    if config:
        raise DDFastError(f"{', '.join(sorted(config))}: a digits teacher's file holds all of its settings")
    if tokenizer is not None:
        raise DDFastError(f"tokenizer: got {tokenizer}, expected none: a digits teacher's file holds its own")
    return load_digits_teacher(Path(weights))


def save_student(
    path: str | Path, student: Student, config: dict[str, Any], *, live: dict[str, Any] | None = None
) -> None:
    """Write a student's averaged weights, and optionally the live ones, to one safetensors file.

    Args:
        path: the file.
        student: carries the averaged weights.
        config: stored in the header: how the student was made.
        live: tensors of the weights without averaging, by the same names.
    """
    tensors = {_AVERAGE + name: value for name, value in student.state_dict().items()}
    tensors |= live or {}
    save_tensors(Path(path), tensors, {"student": student.config, **config})


def load_student(weights: str | Path, teacher: Teacher, *, ema: bool = True) -> Student:
    """A DD1 student from a file or the folder that holds it.

    Args:
        weights: `student.safetensors`, or a folder with that file.
        teacher: whose trajectories it learnt.
        ema: the averaged weights; False: the live ones, where the file has them.

    Raises:
        DDFastError: the file is missing or damaged, or its tensors do not fit the teacher (each named).
    """
    path = Path(weights)
    path = path / STUDENT_FILE if path.is_dir() else path
    tensors, header = load_tensors(path)
    if "student" not in header:
        raise DDFastError(f"{path} is not a student's file")
    student = Student(teacher, **header["student"])
    chosen = {name.removeprefix(_AVERAGE): value for name, value in tensors.items() if name.startswith(_AVERAGE) == ema}
    load_state(student, chosen, path)
    return student.to(teacher.codebook.device).eval().requires_grad_(False)

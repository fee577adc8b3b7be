"""Distilled Decoding 1 and 2: one- and two-step image generators from auto-regressive teachers."""

from ddfast.models.families import register_family
from ddfast.models.family import Family
from ddfast.models.loading import load_student, load_teacher, load_tokenizer, save_student, save_teacher, start_student
from ddfast.ops import noise

__version__ = "0.1.0"

__all__ = [
    "Family",
    "__version__",
    "load_student",
    "load_teacher",
    "load_tokenizer",
    "noise",
    "register_family",
    "save_student",
    "save_teacher",
    "start_student",
]

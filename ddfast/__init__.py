"""Distilled Decoding 1 and 2: one- and two-step image generators from auto-regressive teachers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddfast.models.families import register_family
    from ddfast.models.family import Family
    from ddfast.models.loading import (
        load_student,
        load_teacher,
        load_tokenizer,
        save_student,
        save_teacher,
        start_student,
    )
    from ddfast.ops.noise import noise

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

_LOADING = ("load_student", "load_teacher", "load_tokenizer", "save_student", "save_teacher", "start_student")
_MODULES = {
    "Family": "ddfast.models.family",
    "noise": "ddfast.ops",
    "register_family": "ddfast.models.families",
    **dict.fromkeys(_LOADING, "ddfast.models.loading"),
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for: `ddfast.ops` needs PyTorch and NumPy only."""
    if name not in _MODULES:
        raise AttributeError(f"module 'ddfast' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

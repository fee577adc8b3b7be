"""The families of teachers that there are: a line each, and what a user registers."""

from __future__ import annotations

import re
from typing import Any

from ddfast.config import TeacherConfig, TrainConfig
from ddfast.errors import DDFastError
from ddfast.models.digits.files import DigitsFamily
from ddfast.models.digits.small import DigitsLlamaGenFamily, DigitsVARFamily
from ddfast.models.family import Family
from ddfast.models.llamagen.files import LlamaGenFamily
from ddfast.models.official import Kind, Signs
from ddfast.models.protocol import Teacher
from ddfast.models.text.files import TextFamily
from ddfast.models.var.files import VARFamily

_FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        DigitsFamily(),
        VARFamily(),
        LlamaGenFamily(),
        DigitsVARFamily(),
        DigitsLlamaGenFamily(),
        TextFamily(),
    )
}
"""A family that derives from another stands behind it: the last that knows a teacher has it."""


class _NoFamily(Family):
    """Of teachers that nobody registered."""

    name, teacher, config = "none", Teacher, TeacherConfig

    def untrained(self, config: TrainConfig) -> Teacher:
        raise DDFastError("no family has this configuration; ddfast.register_family makes one known")

    def describe(self, teacher: Any) -> dict[str, Any]:
        known = "ddfast.register_family makes one known (docs/adding-a-teacher.md)"
        raise TypeError(f"teacher: got {type(teacher).__name__}, which is of no family with files; {known}")


_NONE = _NoFamily()


def register_family(family: Family) -> None:
    """Let every command and function know a family of the user's own (docs/adding-a-teacher.md).

    A later family of the same name takes the earlier one's place.

    Args:
        family: an instance of a subclass of `ddfast.Family`.

    Raises:
        TypeError: it is something else, or lacks an attribute.
        ValueError: the name is that of a family of ddfast's.
    """
    if not isinstance(family, Family):
        raise TypeError(f"family: got {family!r}, expected an instance of a subclass of ddfast.Family")
    for attribute in ("name", "teacher", "config"):
        if not hasattr(family, attribute):
            raise TypeError(f"family: {type(family).__name__} has no attribute {attribute}")
    if not re.fullmatch(r"[\w.-]+", family.name):
        raise ValueError(f"family: got the name {family.name!r}, expected letters, digits, points and dashes")
    for role, marks in family.signs.items():
        if len(marks) < 3:
            raise ValueError(f"family: got {len(marks)} signs of a {role}, expected none or at least three")
    there = _FAMILIES.get(family.name)
    if there is not None and there not in registered():
        raise ValueError(f"family: the name {family.name!r} is that of a family of ddfast's; choose another")
    _FAMILIES[family.name] = family


def names() -> list[str]:
    """Of all families."""
    return list(_FAMILIES)


def registered() -> list[Family]:
    """The families of the user's own."""
    return [family for family in _FAMILIES.values() if not type(family).__module__.startswith("ddfast.")]


def named(name: str, source: object) -> Family:
    """The family of a name; a `DDFastError` where there is none, with `source` for whose name it is."""
    if name not in _FAMILIES:
        known = f"known: {', '.join(_FAMILIES)}; --import MODULE registers the families of a module of yours"
        raise DDFastError(f"{source}: family {name!r} is not known; {known}")
    return _FAMILIES[name]


def of_teacher(teacher: Teacher) -> Family:
    """The family of a teacher; of one that nobody registered, a family of students for any teacher, without files."""
    for family in reversed(_FAMILIES.values()):
        if isinstance(teacher, family.teacher):
            return family
    return _NONE


def of_config(config: TeacherConfig) -> Family:
    """The family of a configuration.

    Raises:
        DDFastError: there is none.
    """
    for family in reversed(_FAMILIES.values()):
        if isinstance(config, family.config):
            return family
    raise DDFastError(f"no family has a {type(config).__name__}; ddfast.register_family makes one known")


def signs() -> Signs:
    """What tells the networks of all families by the names of their tensors."""
    return {
        Kind(family.name, str(family), role): marks
        for family in _FAMILIES.values()
        if recognised_as(family) == family.name
        for role, marks in family.signs.items()
    }


def recognised_as(family: Family) -> str | None:
    """The first family that has the same files; None: no names of tensors tell the family's."""
    return next((name for name, one in _FAMILIES.items() if family.signs and one.signs == family.signs), None)

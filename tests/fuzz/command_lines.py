"""Command lines at random: real flags with values of any kind, in any order; stopped before the work."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints
from unittest import mock

from targets import TARGETS, prepared
from trial import Finding, watched, within

from ddfast.cli import COMMANDS, main
from ddfast.config import TrainConfig
from ddfast.convert import ConvertOptions
from ddfast.drawing import SampleOptions
from ddfast.errors import DDFastError
from ddfast.judging import EvaluateOptions
from ddfast.plan import PlanOptions
from ddfast.profile import ProfileOptions
from ddfast.recipes import PRESETS, RECIPES
from ddfast.trajectories.__main__ import TrajectoriesOptions
from ddfast.tune import TuneOptions

OPTIONS: dict[str, type[Any] | None] = {
    "train": TrainConfig, "trajectories": TrajectoriesOptions, "sample": SampleOptions, "evaluate": EvaluateOptions,
    "plan": PlanOptions, "profile": ProfileOptions, "convert": ConvertOptions, "tune": TuneOptions, "doctor": None,
}  # fmt: skip
assert OPTIONS.keys() == COMMANDS.keys()

STOPS = (
    "models.digits.files.OfDigits.build", "models.loading.untrained_teacher", "profile.untrained_teacher",
    "profile.profile", "plan.plan", "evaluate.evaluate", "drawing.save_stream", "judging.Inception", "doctor.diagnosis",
    "models.llamagen.captions.CaptionEncoder",
)  # fmt: skip
"""Where the work begins."""

FOLDERS = {"hub: config": "hub", "npz": "npz", "samples": "pictures", "captions: text": "texts", "config": "settings"}
"""Folders that are there, of these targets."""

VALUES = (
    "", " ", "0", "1", "-1", "2", "5", "64", "1000", "0.5", "-0.5", "1e999", "nan", "inf", "1e-320", "9" * 30,
    "9" * 5000, "x" * 5000, "None", "True", "False", "--", "-", "-x", "--x", "--seed", "=", "a=b", "ä", "\u2028", "\n",
    "\x1b[2J", "\udcff", "🙂", "%s", "{}", "*", "1,2", "1,x", ",", "[1, 2]", "cpu", "cuda", "cuda:99", "meta", "dd1",
    "dd2", "dd1:hub", "stage1", "uniform", "files", "npz", "grid", "exact", "wandb", "3:4", "80GiB", "1e400GiB",
    "-5GiB", "adm", "clean", "official", "float16", *RECIPES, *PRESETS, "os:getcwd", "os:nothing", "os", "nosuch",
    "hub", "npz", "npz/a.npz", "pictures/images", "texts/a.txt", "settings/a.toml", "none/none",
    "out", "out/a.json", "hub/config.json/x", "~nobody/x", "x/" * 3000,
)  # fmt: skip

SHARED = (
    "--config",
    "--recipe",
    "--preset",
    "--import",
    "--help",
    "-h",
    "--debug",
    "--check",
    "--",
    "--cfg",
    "--lr",
    "--x",
)


FITTING = {
    "int": ("0", "1", "-1", "2", "3", "7", "64", "1000", "100000", str(2**31), str(2**63), str(2**64), "9" * 30),
    "float": ("0", "1", "-1", "0.5", "1e-9", "1e-320", "1e308", "1e999", "nan", "inf", "-inf", "3"),
    "bool": ("True", "False"),
    "Path": ("hub", "npz/a.npz", "npz", "pictures/images", "texts/a.txt", "settings/a.toml", "none/none", "out",
             "out/a.json", "hub/model.safetensors", "hub/config.json/x", "~nobody/x", "x/" * 3000, "y" * 300, "\udcff",
             "", "."),
}  # fmt: skip
"""Values of a type that parse, of whatever use they are then; texts have all."""


@functools.cache
def flags(command: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Names of all flags of a command, and some that it has not, with values of their types."""
    kind = OPTIONS[command]
    return (*((name, VALUES) for name in SHARED), *(() if kind is None else _flags(kind, "--")))


def _flags(kind: type[Any], prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = f"{prefix}{field.name.replace('_', '-')}"
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            yield from _flags(inner, f"{name}.")
        else:
            told = str(inner)
            yield name, next((values for kind, values in FITTING.items() if kind in told), VALUES)


def drawn(draw: random.Random) -> list[str]:
    """A command line."""
    command = draw.choice(tuple(OPTIONS))
    if draw.randrange(40) == 0:
        return [draw.choice(VALUES) for _ in range(draw.randrange(4))]
    line = [command]
    if draw.randrange(2) and command in ("sample", "evaluate", "profile", "convert"):
        line += ["--teacher" if command == "convert" else "--student", "hub"]
    for _ in range(draw.choice((0, 1, 1, 1, 2, 2, 3, 5, 9))):
        flag, values = draw.choice(flags(command))
        value = draw.choice(values if draw.randrange(4) else VALUES)
        if draw.randrange(3):
            line += [flag, value]
            continue
        flag = flag.replace("-", "_").replace("__", "--", 1) if draw.randrange(8) == 0 else flag
        line += draw.choice(([flag, value], [flag, value], [f"{flag}={value}"], [flag], [value], [flag, value, value]))
    return line


@contextlib.contextmanager
def place(folder: Path) -> Iterator[None]:
    """Within, a folder with some files is the current one, and the work is not begun."""
    with contextlib.ExitStack() as stack:
        for name, part in FOLDERS.items():
            (data, *_) = prepared(TARGETS[name], folder / part)
            (folder / part / TARGETS[name].file).write_bytes(data)
        before = os.getcwd()
        os.chdir(folder)
        stack.callback(os.chdir, before)
        stack.enter_context(mock.patch.dict(os.environ, {"DDFAST_CACHE": str(folder / "cache"), "COLUMNS": "80"}))
        for name in STOPS:
            stopped = mock.Mock(side_effect=DDFastError("stopped before the work"))
            stack.enter_context(mock.patch(f"ddfast.{name}", stopped))
        yield


def ended(line: list[str]) -> int:
    """The exit code of a command line, in a `place`.

    Raises:
        Finding: it ended in another way than with 0, 1 and one line, or 2.
    """
    shown, errors = io.StringIO(), io.StringIO()
    with (
        watched(Path.cwd()) as outside,
        within(60),
        contextlib.redirect_stdout(shown),
        contextlib.redirect_stderr(errors),
    ):
        try:
            code = main(line)
        except SystemExit as end:
            code = end.code  # type: ignore[assignment]
        except Exception as error:
            raise Finding(f"{type(error).__name__}: {str(error)[:300]}") from error
    said = errors.getvalue()
    if code not in (0, 1, 2) or ("Traceback" in said and "--debug" not in line):
        raise Finding(f"exit code {code}: {said[:1000]}")
    lines = [text for text in said.splitlines() if "error:" in text]
    if code == 1 and "--debug" not in line and (len(lines) != 1 or not lines[0].isprintable()):
        raise Finding(f"exit code 1, {len(lines)} lines: {said[:1000]!r}")
    if outside:
        raise Finding("; ".join(outside[:3]))
    return code

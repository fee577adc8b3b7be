"""What the tests of the commands share: sizes that take seconds, and how a command is called."""

import contextlib
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ddfast.cli import main
from ddfast.evaluation import sources
from ddfast.models.digits import classifier

TINY = [
    "--tokenizer.iterations=30", "--tokenizer.warmup=10", "--tokenizer.batch-size=64",
    "--teacher.width=32", "--teacher.depth=1", "--teacher.heads=2", "--teacher.iterations=20",
    "--teacher.training-images=500", "--teacher.batch-size=32",
    "--trajectories.count=300", "--trajectories.shard-size=50",
    "--evaluation.samples=200", "--evaluation.paths=4", "--evaluation.batch-sizes", "1", "4",
]  # fmt: skip


def command(*arguments: object) -> list[str]:
    """The command line of a process of its own."""
    name, *rest = (str(argument) for argument in arguments)
    return [sys.executable, "-m", f"ddfast.{name}", *rest]


@contextlib.contextmanager
def few_marginals() -> Iterator[None]:
    """Tables of marginals from few samples: what is measured with them says nothing, and takes a tenth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        few = functools.partial(sources.marginal_tables, samples_per_class=20)
        patch.setattr(sources, "marginal_tables", lambda teacher, generator, **_: few(teacher, generator))
        yield


@contextlib.contextmanager
def as_a_process(cache: Path, *arguments: object) -> Iterator[None]:
    """What a process of the command's own would have: its command line, one thread, and this cache."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, few_marginals():
        patch.setenv("DDFAST_CACHE", str(cache))
        patch.setattr(sys, "argv", [f"ddfast.{arguments[0]}", *map(str, arguments[1:])])
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def in_this_process(cache: Path, *arguments: object) -> int:
    """The exit code of a command."""
    with as_a_process(cache, *arguments):
        try:
            return main([str(argument) for argument in arguments])
        except SystemExit as stop:  # bad usage
            return int(stop.code or 0)


def prepare(cache: Path) -> None:
    """A classifier of three updates where `train` and `evaluate` look for theirs, which takes half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDFAST_CACHE", str(cache))
        patch.setattr(classifier, "_ITERATIONS", 3)
        classifier.load_or_train_classifier()


def refused(run, words: str, *arguments: object) -> None:
    """The command fails with one line, which holds the words."""
    done: subprocess.CompletedProcess[str] = run(*arguments, code=1)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"ddfast {arguments[0]}: error: ")
    assert words in line


def refused_here(here, words: str, *arguments: object) -> None:
    """As `refused`, of `here`."""
    code, _, errors = here(*arguments)
    assert code == 1, errors
    (line,) = errors.strip().splitlines()
    assert line.startswith(f"ddfast {arguments[0]}: error: ")
    assert words in line

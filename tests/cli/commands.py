"""What the tests of the commands share: sizes that take seconds, and how a command is called."""

import sys

TINY = [
    "--tokenizer.iterations=30", "--tokenizer.warmup=10", "--tokenizer.batch-size=64",
    "--teacher.width=32", "--teacher.depth=1", "--teacher.heads=2", "--teacher.iterations=20",
    "--teacher.training-images=500", "--teacher.batch-size=32",
    "--trajectories.count=300", "--trajectories.shard-size=50",
    "--evaluation.samples=200", "--evaluation.batch-sizes", "1", "4",
]  # fmt: skip


def command(*arguments: object) -> list[str]:
    name, *rest = (str(argument) for argument in arguments)
    return [sys.executable, "-m", f"ddfast.{name}", *rest]


def refused(run, words: str, *arguments: object) -> None:
    """The command fails with one line, which holds the words."""
    done = run(*arguments, code=1)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"ddfast {arguments[0]}: error: ")
    assert words in line


def refused_here(here, words: str, *arguments: object) -> None:
    """As `refused`, in this process."""
    code, _, errors = here(*arguments)
    assert code == 1, errors
    (line,) = errors.strip().splitlines()
    assert line.startswith(f"ddfast {arguments[0]}: error: ")
    assert words in line

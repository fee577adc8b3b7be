"""What every command shares: recipe, configuration file and overrides, progress, and errors in one line.

`ddfast <command>` and `python -m ddfast.<command>` are the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import tyro
from tqdm import tqdm

from ddfast.config import TrainConfig, read_toml, update
from ddfast.errors import DDFastError
from ddfast.recipes import get_recipe

COMMANDS = {
    "train": "from a teacher to a student, with a report",
    "trajectories": "DD1's training pairs, resumable and extendable",
    "sample": "images or codes from a student",
    "evaluate": "quality and speed of a student",
    "profile": "AR decoding against one and two steps, with traces",
    "convert": "official VAR, LlamaGen and DD1 checkpoints to safetensors and back",
    "doctor": "versions, backends, and why an op runs where it runs",
}

RESUMABLE = ("train", "trajectories")

Options = TypeVar("Options", bound=TrainConfig)
Plain = TypeVar("Plain")
_PLAIN_SECONDS = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `ddfast`: run the command that the first argument names."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] not in COMMANDS:
        wanted = not arguments or arguments[0] in ("-h", "--help")
        lines = [f"  {name:14s}{what}" for name, what in COMMANDS.items()]
        text = "usage: ddfast COMMAND [options]; ddfast COMMAND --help explains one\n\n" + "\n".join(lines)
        if wanted:
            print(text)
            return 0
        print(f"ddfast: error: unknown command {arguments[0]!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = "ddfast.trajectories.__main__" if arguments[0] == "trajectories" else f"ddfast.{arguments[0]}"
    return importlib.import_module(module).main(arguments[1:])


def run(command: str, body: Callable[[list[str]], None], arguments: Sequence[str] | None) -> int:
    """Run one command's body and turn what went wrong into one line and an exit code.

    0: success; 1: a failure that says what to do; 130: interrupted, to be resumed. `--debug` shows tracebacks.
    """
    rest = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in rest
    if debug:
        rest.remove("--debug")
    try:
        body(rest)
    except KeyboardInterrupt:
        then = "the same command continues where it stopped" if command in RESUMABLE else "nothing was changed"
        print(f"\nddfast {command}: interrupted; {then}", file=sys.stderr)
        return 130
    except (DDFastError, ValueError, TypeError, OSError) as error:
        if debug:
            traceback.print_exc()
        line = " ".join(str(error).split())
        print(f"ddfast {command}: error: {line}", file=sys.stderr)
        return 1
    return 0


def parse(command: str, kind: type[Options], arguments: list[str], examples: str) -> Options:
    """Options of a command: the recipe's values, overridden by `--config FILE` and then by flags.

    Args:
        command: its name, for the help text.
        kind: `TrainConfig` or a subclass with the command's own fields.
        arguments: the command line without the command.
        examples: shown by `--help`.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--recipe", default=None)
    early.add_argument("--config", default=None)
    known, _ = early.parse_known_args(arguments)
    rest = _without(arguments, "--config")
    file = read_toml(Path(known.config)) if known.config else {}
    recipe = get_recipe(known.recipe or file.get("recipe", "digits"))
    values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    default = kind(**values)
    update(default, file)
    description = f"{COMMANDS[command]}. --config FILE reads TOML; --debug shows tracebacks.\n\nExamples:\n{examples}"
    options = tyro.cli(kind, default=default, args=rest, prog=f"ddfast {command}", description=description)
    if options.method != recipe.method and options.out == recipe.out:  # both methods have their default folder
        options.out = options.out.with_name(f"{options.out.name}-{options.method}")
    return options


def parse_plain(command: str, kind: type[Plain], arguments: list[str], examples: str) -> Plain:
    """Options of a command that works on a finished run and so takes no recipe."""
    description = f"{COMMANDS[command]}. --debug shows tracebacks.\n\nExamples:\n{examples}"
    return tyro.cli(kind, args=arguments, prog=f"ddfast {command}", description=description)


def labels(text: str) -> tuple[int, ...] | None:
    """Class labels from "1,2,3"; None for an empty text."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else None
    except ValueError:
        raise DDFastError(f"--classes: got {text!r}, expected numbers separated by commas, such as 1,2,3") from None


def progress_bar(title: str) -> Callable[[int, int, str], None]:
    """A callback progress(done, total, text): a bar with rate and ETA on a terminal, a line now and then elsewhere."""
    bar: tqdm | None = None
    started = last = time.monotonic()

    def on_terminal(done: int, total: int, text: str) -> None:
        nonlocal bar
        if bar is None or bar.total != total:
            bar = tqdm(total=total, desc=title, dynamic_ncols=True)
        bar.set_postfix_str(text, refresh=False)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    def plain(done: int, total: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < _PLAIN_SECONDS:
            return
        last = now
        rate = done / max(now - started, 1e-9)
        left = f"{(total - done) / rate:.0f} s left" if done else "started"
        print(f"{title}: {done}/{total}, {rate:.1f}/s, {left}, {text}", flush=True)

    return on_terminal if sys.stderr.isatty() else plain


def _without(arguments: list[str], option: str) -> list[str]:
    """The arguments less `option VALUE` and `option=VALUE`."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == option:
            skip = True
        elif not argument.startswith(option + "="):
            kept.append(argument)
    return kept

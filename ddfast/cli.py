"""What every command shares: recipe, configuration file and overrides, and errors in one line.

`ddfast <command>` and `python -m ddfast.<command>` are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from ddfast import env, processes
from ddfast.config import DD1_PREFIX, MethodConfig, SettingError, TrainConfig, read_toml, update
from ddfast.errors import DDFastError, first_line, is_out_of_memory
from ddfast.interruption import EXIT_CODE, Terminated, answered
from ddfast.messages import first_process
from ddfast.models import families
from ddfast.recipes import get_recipe, import_users

COMMANDS = {
    "train": "from a teacher to a student, with a report",
    "trajectories": "DD1's training pairs, resumable and extendable",
    "sample": "images or codes from a student",
    "evaluate": "quality and speed of a student; FID, sFID, Inception score, precision, recall of anyone's images",
    "plan": "memory, micro-batches, hours and disk of a training, before it starts",
    "profile": "AR decoding against one and two steps, with traces",
    "convert": "official VAR, LlamaGen and DD1 checkpoints to safetensors and back",
    "tune": "the fastest kernels on this GPU, at the shapes of a recipe",
    "doctor": "versions, backends, and why an op runs where it runs",
}

RESUMABLE = ("train", "trajectories")
_CONTINUES = "the same command continues where it stopped"
_PIPE_CLOSED = 141  # as a shell tells SIGPIPE
IN_MANY_PROCESSES = ("train", "trajectories", "sample", "evaluate", "doctor")

Options = TypeVar("Options", bound=TrainConfig)
Plain = TypeVar("Plain")

_BY_CONVERT = "not an option here: `ddfast convert` reads it off the official files"
_OFFICIAL: dict[str, dict[str, str]] = {
    "sample": {
        **dict.fromkeys(("cfg", "cfg-scale"), "--guidance.cfg-scale"),
        "cfg-interval": "--guidance.cfg-interval",
        "temperature": "--guidance.temperature",
        "top-k": "--guidance.top-k",
        "top-p": "--guidance.top-p",
        **dict.fromkeys(("g-seed", "global-seed"), "--seed"),
        **dict.fromkeys(("num-fid-samples", "num-samples", "num-sample", "n-samples", "num-images"), "--count"),
        **dict.fromkeys(("per-proc-batch-size", "bs"), "--batch-size"),
        **dict.fromkeys(("class-labels", "class-label", "label"), "--classes"),
        **dict.fromkeys(("prompt", "prompts"), "--caption"),
        "prompt-csv": "--captions",
        **dict.fromkeys(("t5-path", "t5-model-type"), "--text-encoder"),
        **dict.fromkeys(("sample-dir", "save-dir", "out-dir", "outdir", "out", "output"), "--to"),
        **dict.fromkeys(("gpt-ckpt", "var-ckpt", "ckpt", "ckpt-path"), "--student, a folder made by `ddfast convert`"),
        **dict.fromkeys(("vq-ckpt", "vae-ckpt"), "--tokenizer of `ddfast convert`"),
        **dict.fromkeys(("loss-split-t", "split-t", "split"), "--split of `ddfast convert`"),
        "t-list": "--steps and --point",
        **dict.fromkeys(("teacher-start-t", "t-teacher-start"), "--point and --teacher-steps"),
        **dict.fromkeys(
            (
                "image-size", "downsample-size", "codebook-size", "codebook-embed-dim", "num-classes", "cls-token-num",
                "gpt-model", "gpt-type", "vq-model", "from-fsdp", "depth", "precision", "mixed-precision",
            ),
            _BY_CONVERT,
        ),
        "image-size-eval": "--resize",
        "more-smooth": "not here: officially it draws by Gumbel softmax, for pictures only",
        **dict.fromkeys(("compile", "no-compile"), "not an option here: CUDA graphs are used by themselves"),
    },
    "evaluate": {
        **dict.fromkeys(("num-fid-samples", "num-samples"), "--count of --protocol, or --evaluation.samples"),
        **dict.fromkeys(("per-proc-batch-size", "bs"), "--batch-size of --protocol, or --evaluation.batch-size"),
    },
}  # fmt: skip
_OFFICIAL["train"] = _OFFICIAL["trajectories"] = _OFFICIAL["profile"] = {
    **dict.fromkeys(("cfg", "cfg-scale"), "--teacher.cfg-scale"),
    "temperature": "--teacher.temperature",
    "top-k": "--teacher.top-k",
    "top-p": "--teacher.top-p",
    **dict.fromkeys(("gpt-ckpt", "var-ckpt", "ckpt"), "--teacher.weights"),
    **dict.fromkeys(("vq-ckpt", "vae-ckpt"), "--tokenizer.weights"),
    **dict.fromkeys(("g-seed", "global-seed"), "--seed"),
    **dict.fromkeys(("bs", "batch-size", "global-batch-size"), "--dd1.batch-size or --trajectories.batch-size"),
    **dict.fromkeys(("lr", "learning-rate", "tblr"), "--dd1.learning-rate"),
    **dict.fromkeys(("epochs", "ep", "iterations"), "--dd1.iterations"),
    **dict.fromkeys(("results-dir", "out-dir", "local-out-dir-path"), "--out"),
    "num-classes": "--teacher.num-classes",
    "depth": "--teacher.depth",
    "image-size": "--teacher.block-size (LlamaGen) or --teacher.patch-nums (VAR)",
}
"""What the official scripts call a flag, and what it is called here."""


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

    0: success; 1: a failure that says what to do; 130: interrupted, to be resumed; 75: ended by SIGTERM, to be resumed;
    141: who read its output has gone.
    `--debug` shows tracebacks. What ends several processes alike, the first one says; what ends another one, that one,
    with its number.
    """

    with answered():
        return _run(command, body, list(sys.argv[1:] if arguments is None else arguments))


def _run(command: str, body: Callable[[list[str]], None], rest: list[str]) -> int:
    def say(words: str) -> None:
        print(f"{newline}ddfast {command}: {words}", file=sys.stderr, flush=True)

    newline = ""
    debug = "--debug" in rest
    if debug:
        rest.remove("--debug")
    try:
        rest = _import_users(rest)
        if command not in IN_MANY_PROCESSES:
            env.check_one_process(f"`{command}`", several=IN_MANY_PROCESSES)
        body(rest)
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        resumed = _CONTINUES if command in RESUMABLE else "nothing was changed"
        newline = "\n"  # after the ^C of a terminal
        processes.last_words(f"interrupted; {str(interrupt) or resumed}", say, interrupted=True)
        return EXIT_CODE if isinstance(interrupt, Terminated) else 130
    except BrokenPipeError:  # `| head` has enough; Python would complain of it again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except Exception as error:
        line = _one_line(command, error)
        if not line:
            processes.record(error)
            raise
        if debug:
            traceback.print_exc()
        processes.last_words(f"error: {line}", say)
        processes.record(error)
        return 1
    return 0


def _one_line(command: str, error: Exception) -> str:
    """What to tell of an error; empty: it is none of the user's."""
    if is_out_of_memory(error) and not isinstance(error, DDFastError):
        kept = f"; {_CONTINUES}" if command in RESUMABLE else ""
        return f"there was not enough memory ({first_line(error)}): free some, or make batches smaller{kept}"
    if isinstance(error, (DDFastError, ValueError, TypeError, OSError)):
        return " ".join(str(error).split())
    return ""


def parse(command: str, kind: type[Options], arguments: list[str], examples: str) -> Options:
    """Options of a command: the recipe's values, overridden by `--config FILE` and then by flags.

    Args:
        command: its name, for the help text.
        kind: `TrainConfig` or a subclass with the command's own fields.
        arguments: the command line without the command.
        examples: shown by `--help`.
    """
    if command != "train":
        check_effect(arguments, dict.fromkeys(("track", "profile-steps"), "only `ddfast train` trains"))
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--recipe", default=None)
    early.add_argument("--preset", default=None)
    early.add_argument("--config", default=None)
    known, _ = early.parse_known_args(arguments)
    rest = _without(arguments, "--config")
    file = read_toml(Path(known.config)) if known.config else {}
    told = Path(known.config) if known.config and not known.recipe else None
    name, of_file = known.recipe or file.get("recipe", "digits"), "" if known.recipe else file.get("preset", "")
    recipe = get_recipe(name, preset=of_file if known.preset is None else known.preset, told=told)
    values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(TrainConfig)}
    default = kind(**values)
    update(default, file)
    description = _description(command, examples, "--config FILE reads TOML; ")
    options = _parsed(command, kind, rest, description, default=default)
    default_folder = options.out == recipe.out and "out" not in set(typed(rest))
    if not options.method.isidentifier():  # it becomes part of a folder's name
        raise DDFastError(f"--method: got {options.method!r}, expected a name such as dd1")
    if options.method != recipe.method and default_folder:  # both methods have one
        options.out = options.out.with_name(f"{options.out.name}-{options.method}")
    return options


def parse_plain(command: str, kind: type[Plain], arguments: list[str], examples: str) -> Plain:
    """Options of a command that works on a finished run and so takes no recipe."""
    return _parsed(command, kind, arguments, _description(command, examples))


def _description(command: str, examples: str, more: str = "") -> str:
    """What `--help` says before the options."""
    own = "--import MODULE imports a module of yours first, with families of teachers (docs/adding-a-teacher.md)"
    return f"{COMMANDS[command]}. {more}{own}; --debug shows tracebacks.\n\nExamples:\n{examples}"


def _parsed(command: str, kind: type[Plain], arguments: list[str], description: str, **settings: Any) -> Plain:
    """tyro's options; a flag by its official name, or a setting out of range, is an error in one line."""
    own = {field.name.replace("_", "-") for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for flag in typed(arguments):
        if flag in _OFFICIAL.get(command, {}) and flag not in own:
            raise DDFastError(f"--{flag}: {_OFFICIAL[command][flag].replace('--', 'here it is called --', 1)}")
    shown, help_text = io.StringIO(), sys.stdout if first_process() else io.StringIO()
    try:
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(help_text):
            return tyro.cli(kind, args=arguments, prog=f"ddfast {command}", description=description, **settings)
    except SystemExit as end:
        error: BaseException | None = end
        while error is not None and not isinstance(error, SettingError):
            error = error.__cause__ or error.__context__
        if error is None:
            processes.last_words(shown.getvalue(), sys.stderr.write)
            raise
        raise error from None


def typed(arguments: Sequence[str]) -> Iterator[str]:
    """Names of the flags among a command's arguments, without dashes in front."""
    for argument in arguments:
        if argument.startswith("--"):
            yield argument[2:].partition("=")[0].replace("_", "-")


def check_effect(arguments: Sequence[str], ignored: Mapping[str, str]) -> None:
    """Raise for a flag that was typed and has no effect.

    Args:
        arguments: the command line.
        ignored: flags, or tables of flags ("dd1"), and why each has none.
    """
    for flag in typed(arguments):
        for name, reason in ignored.items():
            if flag == name or flag.startswith(f"{name}."):
                raise DDFastError(f"--{flag}: has no effect: {reason}")


def of_other_methods(options: TrainConfig) -> dict[str, str]:
    """Flags of training that have no effect with a recipe and a method, for `check_effect`."""
    fields = (field.name for field in dataclasses.fields(options))
    methods = [name for name in fields if isinstance(getattr(options, name), MethodConfig)]
    ignored = {}
    if options.method in methods:  # another one is refused by its name
        why = f"--method {options.method} has settings of its own"
        ignored = {name: why for name in methods if name != options.method}
    if options.method == "dd1" and not options.init.startswith(DD1_PREFIX):  # that one says what it is for
        ignored["init"] = "only --method dd2 starts from anything but the teacher"
    network = families.of_config(options.teacher).students.get("dd2")
    if not getattr(network, "looks_up", False):
        ignored["dd2.adapt"] = "only networks of teachers that look their tokens up (LlamaGen) are adapted"
    return ignored


def of_other_weights(options: TrainConfig) -> dict[str, str]:
    """Flags of a teacher that have no effect where its weights come from, for `check_effect`."""
    ignored, teacher = {}, options.teacher
    if getattr(teacher, "random_weights", False):
        ignored = dict.fromkeys(("teacher.weights", "tokenizer.weights"), "--teacher.random-weights draws them")
    elif hasattr(teacher, "weights") and families.of_config(teacher).tokenizer_file:
        sizes = (field.name.replace("_", "-") for field in dataclasses.fields(options.tokenizer))
        ignored = {f"tokenizer.{name}": "the tokenizer's file decides" for name in sizes if name != "weights"}
    return ignored


def overlay(target: Any, options: Any, table: str, arguments: Sequence[str]) -> None:
    """Set the fields of `target` that were typed as flags of a table; the others keep what a run's file says."""
    flags = set(typed(arguments))
    for field in dataclasses.fields(options):
        if f"{table}.{field.name.replace('_', '-')}" in flags:
            setattr(target, field.name, getattr(options, field.name))


def _import_users(arguments: list[str]) -> list[str]:
    """Import the modules of `--import MODULE`; returns the other arguments."""
    importing = argparse.ArgumentParser(prog="ddfast", add_help=False, allow_abbrev=False)
    importing.add_argument("--import", dest="modules", action="append", default=[])
    known, rest = importing.parse_known_args(arguments)
    for module in known.modules:
        import_users(module)
    return rest


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

"""Official checkpoints as people have them: in any wrapping, with whatever the file says about itself.

`find_weights` looks through a file's content for sets of weights and names what each is; `choose` takes the wanted one;
`settle` brings together what user, tensors, stored settings and file name say of a model.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ddfast.errors import DDFastError
from ddfast.files import parse_json, read_text
from ddfast.messages import say
from ddfast.models.checkpoint import INDEX_SUFFIX, AnyTensor, tensors_of

STUDENT_FILE, TEACHER_FILE = "student.safetensors", "model.safetensors"

CONFIG_FILE = "config.json"

UNFINISHED = "checkpoint.safetensors"
"""State of a training of ours that is under way: no model to load."""

AVERAGE = "ema."
"""Prefix of the averaged weights in a student's file, beside the live ones."""

TOKENIZER = "tokenizer."
"""Prefix of the tokenizer's tensors in a teacher's file of ours."""

_FOLDER_FILES = (TEACHER_FILE, "pytorch_model.bin", "consolidated.pth", "model.pth", "model.pt", "model.ckpt")
"""Names of a folder's weights, after what ddfast and Hugging Face, FSDP scripts and others call them."""

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
"""Parts of a name, wherever they stand, that come from wrappers: data parallelism, torch.compile, checkpointing."""

_DOCUMENTED_ORDER = ("model", "module", "state_dict", "model_state_dict", "var_wo_ddp", "net")
"""Keys under which official scripts look for weights, in their order."""

_SETTINGS = {"args", "config", "cfg", "hparams", "hyper_parameters", "model_args", "model_config", "opt", "options"}
"""Keys under which training scripts store their options."""

# Official arguments that change no output of a trained model: accepted, so that a model's own configuration can be
# passed as it is.
_WITHOUT_EFFECT = {
    "cond_drop_rate", "drop_rate", "attn_drop_rate", "drop_path_rate", "flash_if_available", "fused_if_available",
    "token_dropout_p", "attn_dropout_p", "resid_dropout_p", "ffn_dropout_p", "initializer_range",
    "max_batch_size", "max_seq_len", "multiple_of", "ffn_dim_multiplier", "beta", "commit_loss_beta", "test_mode",
    "entropy_loss_ratio", "codebook_show_usage", "dropout", "dropout_p", "n_d_embed_enable", "in_channels",
    "double_z", "using_sa", "using_mid_sa",
}  # fmt: skip

_MARKS = {
    "dd2": ("velocity_head.",),
    "dd1": ("final_layer_conti.linear.weight", "n_d_embed.weight", "data_embedding.weight"),
}
"""How names begin that a method's student has beside its teacher's."""


class Kind(NamedTuple):
    """What a set of weights is: a family, its title, and "teacher", "tokenizer" or the method of a student."""

    family: str
    title: str
    role: str

    def __str__(self) -> str:
        if self.is_student:
            return f"a {self.role.upper()} student of a {self.title} teacher"
        return f"a {self.title} {self.role}"

    @property
    def is_student(self) -> bool:
        """Whether it is a student's, of whatever method."""
        return self.role not in ("teacher", "tokenizer")


Signs: TypeAlias = Mapping[Kind, tuple[str, ...]]
"""Names that say of which network a state is; three of them are enough, so that an incomplete file is named as what it
is, with what it lacks."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """A set of weights that a file holds.

    Attributes:
        kind: what it is; None: no network that ddfast knows.
        path: the keys, and prefixes of names, under which it was.
        tensors: by their official names.
    """

    kind: Kind | None
    path: tuple[str, ...]
    tensors: dict[str, AnyTensor]

    @property
    def averaged(self) -> bool:
        """Whether its place says that these are averages over training."""
        return any(re.search(r"(^|_)(ema|swa|averaged?|shadow)(_|$)", part.lower()) for part in self.path)

    @property
    def place(self) -> str:
        """Where in the file it is."""
        return ".".join(self.path)


def checkpoint_file(given: str | Path) -> Path:
    """The file itself: `given`, or the weights in the folder that it names.

    Raises:
        DDFastError: the folder holds no weights, or several files that may be them.
    """
    path = Path(given).expanduser()
    if not path.is_dir():
        return path
    for name in _FOLDER_FILES:
        for candidate in (path / name, path / (name + INDEX_SUFFIX)):
            if candidate.is_file():
                return candidate
    suffixes = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar")
    names = (file.name for file in path.iterdir() if file.suffix.lower() in suffixes)
    others = sorted(name for name in names if name != UNFINISHED)
    if len(others) == 1:
        return path / others[0]
    held = f"it holds {', '.join(others[:5])}: name one" if others else f"expected {TEACHER_FILE}"
    raise DDFastError(f"no checkpoint at {path}: a folder, and {held}")


def find_weights(content: Mapping[Any, Any], signs: Signs, path: tuple[str, ...] = ()) -> list[Weights]:
    """Every set of weights in a checkpoint's content, whatever it is wrapped in, outermost first."""
    tensors = {_unwrapped(name): value for name, value in tensors_of(content).items()}
    found = list(_sets(tensors, signs, path)) if tensors else []
    for name, value in content.items():
        if isinstance(value, Mapping):
            found += find_weights(value, signs, (*path, str(name)))
    return found


def largest_set(content: Mapping[Any, Any], source: object) -> dict[str, AnyTensor]:
    """The tensors of a network that is none of ddfast's: the largest set in a checkpoint's content."""
    found = find_weights(content, {})
    if not found:
        raise DDFastError(f"{source} holds no tensors")
    return max((one.tensors for one in found), key=len)


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _sets(tensors: dict[str, AnyTensor], signs: Signs, path: tuple[str, ...]) -> Iterator[Weights]:
    """The networks among tensors: under a common prefix, several side by side, or as they are."""
    groups: dict[str, dict[str, AnyTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        first, dot, behind = name.partition(".")
        if dot:
            groups[first][behind] = tensor
    rest, inside = dict(tensors), []
    for prefix, group in groups.items():
        known = [one for one in _sets(group, signs, (*path, prefix)) if one.kind] if len(group) > 2 else []
        if known:
            inside += known
            rest = {name: value for name, value in rest.items() if not name.startswith(prefix + ".")}
    kind = _kind_of(rest, signs)
    if rest and (kind or not inside):
        yield Weights(kind, path, rest)
    yield from inside


def _kind_of(tensors: Mapping[str, AnyTensor], signs: Signs) -> Kind | None:
    for kind, names in signs.items():
        if sum(name in tensors for name in names) < 3:
            continue
        methods = (method for method, marks in _MARKS.items() if any(name.startswith(marks) for name in tensors))
        return kind._replace(role=next(methods, kind.role)) if kind.role == "teacher" else kind
    return None


def choose(
    found: list[Weights],
    wanted: str,
    source: object,
    *,
    family: str | None = None,
    averaged: bool = False,
    strict: bool = False,
    silent: bool = False,
) -> Weights:
    """The set of weights that is wanted, where a file may hold several.

    Of averaged and live weights of one network, those that are asked for; of several of these, the one that official
    scripts take. What is taken, where there was a choice, is said.

    Args:
        found: of `find_weights`.
        wanted: "teacher", "tokenizer" or "student" (of any method).
        source: the file, for errors.
        family: whose weights are wanted; None: any.
        averaged: averaged weights rather than live ones.
        strict: the others will not do.
        silent: say nothing: the file is ours, and its sets are what they should be.

    Raises:
        DDFastError: there is none; the error says what there is.
    """

    def fits(kind: Kind) -> bool:
        return family in (None, kind.family) and (kind.is_student if wanted == "student" else kind.role == wanted)

    fitting = [one for one in found if one.kind and fits(one.kind)]
    if not fitting:
        raise DDFastError(f"{source} {_what_is_there(found, wanted)}")
    order = {name: number for number, name in enumerate(_DOCUMENTED_ORDER)}

    def rank(one: Weights) -> tuple[bool, int]:
        return one.averaged != averaged, min((order.get(key, len(order)) for key in one.path), default=-1)

    chosen = min(fitting, key=rank)
    asked, others = ("averaged", "live") if averaged else ("live", "averaged")
    if chosen.averaged != averaged and strict:
        raise DDFastError(f"{source} holds {others} weights alone; ema={averaged} asks for the {asked} ones")
    same = [one for one in fitting if one.kind == chosen.kind]
    if silent:
        return chosen
    if len(same) > 1:
        places = ", ".join(one.place or "top level" for one in same)
        way = f"; ema={not averaged} reads the {others} ones" if {one.averaged for one in same} == {True, False} else ""
        say(f"{source} holds several sets of weights ({places}): {chosen.place or 'top level'} is read{way}")
    elif chosen.averaged != averaged:
        say(f"{source} holds one set of weights ({chosen.place or 'top level'}), not {asked} ones: it is read")
    return chosen


_WANTED = {
    "teacher": "a teacher's checkpoint",
    "tokenizer": "a tokenizer of VAR or LlamaGen",
    "student": "a student's file",
}


def _what_is_there(found: list[Weights], wanted: str) -> str:
    """The end of a sentence that begins with the file's name."""
    names = [name for one in found for name in one.tensors]
    if not names:
        return "holds no tensors"
    if any("flat_param" in name for name in names):
        return "is one part of a model that FSDP has split: save a full state_dict (FullStateDictConfig)"
    kinds = list(dict.fromkeys(one.kind for one in found if one.kind))
    if not kinds:
        few = ", ".join(names[:3])
        return f"is not {_WANTED[wanted]}: no model that ddfast knows has its {len(names)} tensors, such as {few}"
    advice = "the transformer's file comes first, the tokenizer's second"
    if wanted == "student":
        advice = "load_teacher and load_tokenizer read it (--teacher, --tokenizer)"
    elif kinds[0].is_student:
        advice = "load_student(file, teacher) reads it (--student)"
    elif kinds[0].role == wanted:
        advice = "another family was asked for"
    return f"is not {_WANTED[wanted]}: it is {' and '.join(map(str, kinds))}; {advice}"


class Said(NamedTuple):
    """What one source says of a model: settings by their official names."""

    where: str
    values: dict[str, Any]


def stored_settings(content: Mapping[Any, Any], header: Mapping[str, Any], path: Path) -> list[Said]:
    """What a checkpoint says about itself: options of the training script, config.json beside it, and our header."""
    found = list(_settings_in(content, ()))
    beside = path.parent / CONFIG_FILE
    if path.name.removesuffix(INDEX_SUFFIX) in _FOLDER_FILES and beside.is_file():
        found.append(Said(CONFIG_FILE, read_config(beside)))
    found.append(Said("the header", header.get("config", {})))
    return [Said(where, _flat(values)) for where, values in found]


def read_config(path: Path) -> dict[str, Any]:
    """The content of a config.json; a `DDFastError` where it is damaged."""
    try:
        values = parse_json(read_text(path))
    except ValueError as error:
        raise DDFastError(f"{path} is damaged ({error}); restore it, or delete it and give the settings") from error
    return values if isinstance(values, dict) else {}


def _settings_in(content: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[Said]:
    for name, value in content.items():
        if name in _SETTINGS:
            values = vars(value) if isinstance(value, argparse.Namespace) else value
            if isinstance(values, Mapping):
                yield Said(".".join((*path, name)), dict(values))
        elif isinstance(value, Mapping) and not tensors_of(value):
            yield from _settings_in(value, (*path, str(name)))


def _flat(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Settings, with those of nested tables (`vae_kwargs`, a config within a config) beside them."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        if isinstance(value, Mapping):
            flat = {**_flat(value), **flat}
        elif value is not None:
            flat[str(name)] = value
    return flat


def settle(
    tensors: dict[str, Any],
    given: dict[str, Any],
    stored: Iterable[Said],
    source: object,
    *,
    aliases: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Settings from user, tensors and what is stored: {name: value}, None where nothing tells.

    Args:
        tensors: what they say, a key for every setting there is; None where they cannot tell.
        given: what the user says, by official names.
        stored: what the file says about itself; other names than settings' are passed over.
        source: of the tensors, for the error.
        aliases: {official name: name in `tensors`} where they differ.

    Raises:
        DDFastError: the user's name is unknown, or two of the three disagree.
    """
    aliases = aliases or {}
    unknown = [name for name in given if aliases.get(name, name) not in tensors and name not in _WITHOUT_EFFECT]
    if unknown:
        known = ", ".join(sorted({*tensors, *aliases}))
        raise DDFastError(f"{unknown[0]}: not a setting of {source}; known: {known}")
    settled = dict(tensors)
    origin = dict.fromkeys(tensors, f"the tensors of {source} say")
    sources = [Said(f"{said.where} of {source} says", said.values) for said in stored]
    for where, values in [Said("", given), *sources]:
        for official, value in values.items():
            name = aliases.get(official, official)
            value = tuple(value) if isinstance(value, list) else value
            if name not in settled or value is None:
                continue
            if settled[name] is None:
                settled[name], origin[name] = value, where or f"{official} was given as"
            elif settled[name] != value:
                first = f"{official}: got {value!r}" if not where else f"{official}: {where} {value!r}"
                raise DDFastError(f"{first}, but {origin[name]} {settled[name]!r}")
    return settled


def part(config: dict[str, Any], names: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings with one of the names, and the others."""
    mine = {name: value for name, value in config.items() if name in names}
    return mine, {name: value for name, value in config.items() if name not in names}


def only(said: Said, names: set[str]) -> Said:
    """What one source says of some settings."""
    return Said(said.where, {name: value for name, value in said.values.items() if name in names})


def count(tensors: Iterable[str], pattern: str) -> int:
    """One more than the largest number that `pattern` (with one group) captures among the names."""
    numbers = [int(match[1]) for name in tensors if (match := re.match(pattern, name))]
    return max(numbers, default=-1) + 1

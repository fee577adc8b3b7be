"""Teachers, tokenizers and students from files, official ones and ddfast's own, and the teachers of recipes.

Family and sizes are read off the tensors; what they cannot tell (`n_head`, the image size) comes from the user, by its
official name, from what the file says about itself, or from its name. Two of these that disagree are an error; what
none of them tells is assumed only where there is a usual case, and said. Our own files hold the same tensors under the
same names, with the settings in the header.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ddfast import processes, seeds
from ddfast.config import PretrainedTeacherConfig, TrainConfig
from ddfast.errors import DDFastError
from ddfast.files import reading
from ddfast.messages import say, warn
from ddfast.models import families
from ddfast.models.autoregressive import SamplingDefaults
from ddfast.models.checkpoint import (
    AnyTensor,
    build_around,
    cast_float,
    check_layers,
    digest,
    one_dtype,
    read_checkpoint,
    save_tensors,
    state_of,
    tensors_of,
)
from ddfast.models.family import Family, Parts, network_parameters, stored_defaults
from ddfast.models.flow_network import TransformerFlowNetwork
from ddfast.models.official import (
    AVERAGE,
    STUDENT_FILE,
    Kind,
    Weights,
    checkpoint_file,
    choose,
    count,
    find_weights,
    stored_settings,
)
from ddfast.models.protocol import Teacher
from ddfast.models.student import DD1Student, Student, TransformerStudent
from ddfast.models.transformer import transformer_sizes
from ddfast.portable import portable
from ddfast.progress import Progress

TEACHER_FILES = ("teacher.weights", "tokenizer.weights", "teacher.captions")
"""Settings of a run that name files of its teacher."""


def load_teacher(
    weights: str | Path,
    tokenizer: str | Path | None = None,
    *,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    defaults: SamplingDefaults | None = None,
    ema: bool = False,
    **config: Any,
) -> Teacher:
    """A teacher from its official files, or from one file or folder of ours.

    Args:
        weights: official checkpoint (`var_d16.pth`, `c2i_L_256.pt`, ...) in any wrapping, a Hugging Face folder with
            its config.json, or what ddfast wrote.
        tokenizer: the tokenizer's checkpoint (`vae_ch160v4096z32.pth`, `vq_ds16_c2i.pt`, ...); a file that holds both
            (ours, and those of VAR's trainer) needs none.
        family: "var", "llamagen", "digits", "digits-var", "digits-llamagen", or one that was registered; None:
            recognised from the file.
        dtype: of the transformer's weights, such as `torch.bfloat16`; None: as stored. Codebook and tokenizer are
            float32 whatever their file holds.
        defaults: sampling settings; None: the published ones.
        ema: the averaged weights, where the file has live ones too; the official scripts take the live ones.
        config: by official names, what the file does not tell: `n_head` where the size is not a published one,
            `block_size` or `image_size`, `rope_base`, `norm_eps`, `num_classes`, `num_heads` where attention is not
            normalised, `patch_nums` where there is no `lvl_1L`, `quant_resi`, `using_znorm`, `codebook_l2_norm`.

    Raises:
        DDFastError: a file is missing, damaged, unsafe or something else than a teacher; a size cannot be told; tensors
            are missing, unexpected or of another shape (each listed); a setting is unknown, or two sources (user,
            tensors, stored settings, file name) disagree.
    """
    path = checkpoint_file(weights)
    content, header = read_checkpoint(path)
    if family is not None:
        families.named(family, path)
    own = _of_our_file(header, path)
    if own is not None:
        if tokenizer is not None:
            raise DDFastError(f"tokenizer {tokenizer}: a {own.name} teacher's file holds its tokenizer")
        _check_live(ema, path)
        if family not in (None, own.name):
            raise DDFastError(f"{path} is a {own} teacher; family={family!r} was asked for")
        return own.read(
            Parts(
                tensors=tensors_of(content), source=path, header=header, config=config, dtype=dtype, defaults=defaults
            )
        )  # fmt: skip
    found = find_weights(content, families.signs())
    wanted = family or (header.get("family") if "defaults" in header else None)
    seen_as = wanted and families.recognised_as(families.named(wanted, path))
    network = _named_family(found, family) or choose(found, "teacher", path, family=seen_as, averaged=ema, strict=ema)
    assert network.kind is not None
    kind = families.named(wanted or network.kind.family, path)
    stored = stored_settings(content, header, path)
    if defaults is None:
        defaults = stored_defaults(header, path)
    parts = Parts(
        tensors=network.tensors, source=path, header=header, config=config, stored=stored, dtype=dtype,
        defaults=defaults,
    )  # fmt: skip
    if not kind.tokenizer_file:
        return kind.read(parts)
    if tokenizer is not None:
        tokens_path = checkpoint_file(tokenizer)
        tokens_content, tokens_header = read_checkpoint(tokens_path)
        of_tokens = stored_settings(tokens_content, tokens_header, tokens_path)
        tokens = choose(find_weights(tokens_content, families.signs()), "tokenizer", tokens_path)
    elif any(one.kind and one.kind.role == "tokenizer" for one in found):
        tokens, tokens_path, of_tokens = choose(found, "tokenizer", path), path, []
    else:
        needed = f"a {kind.name} teacher needs its tokenizer's file as the second argument"
        raise DDFastError(f"{path}: {needed} ({kind.tokenizer_file}; --tokenizer)")
    assert tokens.kind is not None
    if tokens.kind.family != network.kind.family:
        raise DDFastError(f"{tokens_path} is {tokens.kind}, but {path} is {network.kind}: give this family's tokenizer")
    return kind.read(
        dataclasses.replace(
            parts, tokenizer=tokens.tensors, tokenizer_source=tokens_path, tokenizer_stored=of_tokens
        )
    )  # fmt: skip


def _check_live(ema: bool, path: Path) -> None:
    if ema:
        raise DDFastError(f"{path} holds live weights alone; ema=True asks for the averaged ones")


def _of_our_file(header: dict[str, Any], path: Path) -> Family | None:
    """The family that a file of ours names, where its files are not those of others."""
    name = header.get("family")
    if name not in families.names() and "teacher" not in header:
        return None
    family = families.named(str(name), path)
    return None if family.tokenizer_file else family


def _named_family(found: list[Weights], name: str | None) -> Weights | None:
    """The largest set of weights where the user names the family of tensors that tell none, or that none can tell."""
    if name is None or not found:
        return None
    family = families.named(name, "")
    if family.signs and any(one.kind for one in found):
        return None
    largest = max(found, key=lambda one: len(one.tensors))
    return dataclasses.replace(largest, kind=Kind(name, str(family), "teacher"))


def load_tokenizer(path: str | Path, *, ema: bool = False, **config: Any) -> Any:
    """A tokenizer alone, from any file or folder that holds one.

    Args:
        path: `vae_ch160v4096z32.pth`, `vq_ds16_c2i.pt`, `vq_ds16_t2i.pt`, `vq_ds8_c2i.pt`, a trainer's checkpoint, a
            Hugging Face folder with its config.json, a teacher's file or folder of ours, ...
        ema: the averaged weights, where the file has live ones too.
        config: `patch_nums` (VAR; default: 256 pixels' ten scales), `quant_resi`, `using_znorm`, `codebook_l2_norm`.

    Raises:
        DDFastError: as in `load_teacher`.
    """
    path = checkpoint_file(path)
    content, header = read_checkpoint(path)
    own = _of_our_file(header, path)
    if own is not None:
        _check_live(ema, path)
        parts = Parts(tensors=tensors_of(content), source=path, header=header, config=config)
        return own.read_tokenizer(parts)
    found = choose(find_weights(content, families.signs()), "tokenizer", path, averaged=ema, strict=ema)
    assert found.kind is not None
    stored = stored_settings(content, header, path)
    parts = Parts(tensors=found.tensors, source=path, header=header, config=config, stored=stored)
    return families.named(found.kind.family, path).read_tokenizer(parts)


def save_teacher(path: str | Path, teacher: Teacher) -> None:
    """Write a teacher with its tokenizer to one safetensors file that `load_teacher` reads."""
    families.of_teacher(teacher).save(Path(path), teacher)


def build_teacher(config: TrainConfig, progress: Progress | None = None) -> Teacher:
    """The configuration's teacher, on its device: trained on first use (of digits), read from files, or random.

    Of several processes the first one trains it, and the others find it.

    Raises:
        DDFastError: a file is missing, unsafe or of other sizes than the configuration's.
    """
    family, teacher = families.of_config(config.teacher), config.teacher
    if not isinstance(teacher, PretrainedTeacherConfig):
        made = processes.first_then_all(lambda: family.build(config, progress))
    elif teacher.random_weights:
        made = untrained_teacher(config)
    elif not teacher.weights:
        needed = "--teacher.weights FILE" + (" --tokenizer.weights FILE" if family.tokenizer_file else "")
        raise DDFastError(
            f"recipe {config.recipe} needs its teacher's files: {needed} (or --teacher.random-weights to try it out)"
        )
    elif family.tokenizer_file:
        made = load_teacher(
            teacher.weights,
            getattr(config.tokenizer, "weights", "") or None,
            dtype=getattr(torch, teacher.dtype),
            defaults=SamplingDefaults(**teacher.sampling()),
            **family.said(teacher),
        )
        made = family.conditioned(made, teacher)
    else:
        made = _in_dtype(family.conditioned(family.build(config, progress), teacher), teacher.dtype)
    return made.to(config.device)


def untrained_teacher(config: TrainConfig) -> Teacher:
    """The configuration's teacher with random weights drawn from its seed, for tests and profiling."""
    family, teacher = families.of_config(config.teacher), config.teacher
    seeds.seed_all(config.seed)
    made = _in_dtype(family.untrained(config), getattr(teacher, "dtype", "float32"))
    return family.conditioned(made, teacher).eval().requires_grad_(False)


def _in_dtype(teacher: Teacher, dtype: str) -> Teacher:
    """The transformer's weights in a type: codebook and tokenizer stay float32."""
    for _, parameter in network_parameters(teacher):
        parameter.data = cast_float(parameter.data, getattr(torch, dtype))
    return teacher


def student_class(teacher: Teacher, method: str) -> type[Student]:
    """The kind of student that learns from a teacher by a method.

    Raises:
        DDFastError: the teacher's family has none.
    """
    family = families.of_teacher(teacher)
    if method not in family.students:
        known = ", ".join(family.students)
        raise DDFastError(f"family {family.name} has no students of the method {method!r}; known: {known}")
    return family.students[method]


def check_student(teacher: Teacher, method: str) -> None:
    """Raise unless a teacher's family has students of a method, and says how large they are: before hours of work.

    Raises:
        DDFastError: it has none, or does not say it.
    """
    kind, sizes = student_class(teacher, method), families.of_teacher(teacher).sizes
    if issubclass(kind, (TransformerStudent, TransformerFlowNetwork)):
        try:
            transformer_sizes(teacher, *(sizes.get(name) for name in ("width", "depth", "heads")))
        except ValueError as error:
            raise DDFastError(f"{error}: `sizes` of the family ({families.of_teacher(teacher).name})") from error


def student_sizes(teacher: Teacher, recycles: int) -> dict[str, Any]:
    """What a student of the teacher's family is built with; recycles: as in `Student`."""
    return {**families.of_teacher(teacher).sizes, **({"recycles": recycles} if recycles else {})}


def start_student(teacher: Teacher, *, recycles: int = 0) -> DD1Student:
    """A new DD1 student that starts from its teacher's weights; recycles: as in `Student`."""
    made = student_class(teacher, "dd1").from_teacher(teacher, **student_sizes(teacher, recycles))
    assert isinstance(made, DD1Student)
    return made


def save_student(
    path: str | Path, student: Student, config: dict[str, Any], *, live: dict[str, Any] | None = None
) -> None:
    """Write a student's averaged weights, and optionally the live ones, to one safetensors file.

    Args:
        path: the file.
        student: carries the averaged weights.
        config: stored in the header: how the student was made.
        live: tensors of the weights without averaging, by the same names.

    Of a student that is spread over processes, all processes call this and the first writes.
    """
    tensors: dict[str, AnyTensor] = {AVERAGE + name: value for name, value in state_of(student).items()}
    tensors |= live or {}
    family = families.of_teacher(student.teacher).name
    header = {"method": student.method, "family": family, "student": student.config, **student.header()}
    header["learnt_from"] = _identity(student.teacher)
    save_tensors(Path(path), tensors, {**header, **config})


def _identity(teacher: Teacher) -> str:
    """Type of a teacher's transformer, and hex digits of all weights: in another type, these are others."""
    dtype = next((parameter.dtype for _, parameter in network_parameters(teacher)), torch.float32)
    return f"{str(dtype).removeprefix('torch.')} {digest(teacher.state_dict())}"


def _check_identity(header: dict[str, Any], teacher: Teacher, path: Path) -> None:
    """Warn where a student's file says that it learnt from another teacher, as far as their types let it be told."""
    if "learnt_from" not in header:
        return
    theirs, ours = str(header["learnt_from"]), _identity(teacher)
    if theirs.partition(" ")[0] == ours.partition(" ")[0] and theirs != ours:
        files = portable(header.get("files", {}))
        said = [f"{one['file']}, SHA-256 {one['sha256']}" for name, one in files.items() if name in TEACHER_FILES]
        told = f": {'; '.join(said)}" if said else ""
        warn(f"{path}: its student learnt from other weights than this teacher's ({theirs}, not {ours}){told}")


def load_student(
    weights: str | Path, teacher: Teacher, *, ema: bool = True, dtype: torch.dtype | None = None
) -> Student:
    """A student from DD1's official file, from a file of ours (DD1 or DD2), or from the folder that holds one.

    Args:
        weights: `var-d16.pth`, `LlamaGen-DD-L.pt`, ..., in any wrapping, or `student.safetensors`, a folder with that
            file, or `torch.save(student.state_dict())`.
        teacher: from which it learnt.
        ema: the averaged weights; False: the live ones. A file with one set of weights gives these, and where that is
            not what was asked for, it is said.
        dtype: of the weights; None: as stored.

    Raises:
        DDFastError: the file is missing, damaged, unsafe or something else, or its tensors do not fit the teacher (each
            named). A teacher of other weights than those that the file says it learnt from is warned of.
    """
    path, found, header = read_students(weights, teacher)
    chosen = choose(found, "student", path, averaged=ema, strict=not ema, silent=bool(header))
    return student_from(chosen, path, header, teacher, dtype=dtype)


def read_students(weights: str | Path, teacher: Teacher) -> tuple[Path, list[Weights], dict[str, Any]]:
    """A student's file, the sets of weights in it, and its header (empty where ddfast did not write it)."""
    path = Path(weights)
    path = path / STUDENT_FILE if (path / STUDENT_FILE).is_file() else checkpoint_file(path)
    content, header = read_checkpoint(path)
    _check_identity(header, teacher, path)
    if "method" not in header:
        return path, find_weights(content, families.signs()), header
    tensors, family = tensors_of(content), families.of_teacher(teacher)
    if header.get("family", family.name) != family.name and header["family"] in families.names():
        family = families.named(header["family"], path)
    elif "family" not in header:  # of before: the names of its tensors tell
        kinds = (one.kind for one in find_weights(content, families.signs()) if one.kind and one.kind.is_student)
        family = next((families.named(kind.family, path) for kind in kinds), family)
    averaged = {name.removeprefix(AVERAGE): value for name, value in tensors.items() if name.startswith(AVERAGE)}
    live = {name: value for name, value in tensors.items() if not name.startswith(AVERAGE)}
    sets = ((averaged, (AVERAGE.rstrip("."),)), (live, ()))
    kind = Kind(family.name, str(family), header["method"])
    found = [Weights(kind, place, tensors) for tensors, place in sets if tensors]
    return path, found, header


def student_from(
    chosen: Weights, path: Path, header: dict[str, Any], teacher: Teacher, *, dtype: torch.dtype | None = None
) -> Student:
    """The student of one set of the weights that `read_students` found; errors as of `load_student`."""
    assert chosen.kind is not None
    family, method = families.of_teacher(teacher), chosen.kind.role
    kind = family.students.get(method)
    if kind is None or not _learns_from(kind, chosen.kind.family):
        raise DDFastError(f"{path} is {chosen.kind}, but the teacher is a {type(teacher).__name__}")
    config = header["student"] if "student" in header else _student_config(chosen, family, teacher, path)
    check_layers(config, chosen.tensors, path)

    def make() -> Student:
        with reading(path, f"does not fit {kind.__name__}"):
            return kind(teacher, **config)

    student = build_around(
        make,
        chosen.tensors,
        path,
        derived=family.derived,
        dtype=dtype or one_dtype(chosen.tensors, path),
    )
    student.read_header(header)
    return student.to(teacher.codebook.device)


def _learns_from(kind: type[Student], family: str) -> bool:
    """Whether students of a kind are those, or derive from those, that a family's files are recognised as."""
    if family not in families.names():  # a teacher that nobody registered: its students are any teacher's
        return True
    return any(issubclass(kind, one) for one in families.named(family, "").students.values())


def _student_config(chosen: Weights, family: Family, teacher: Teacher, path: Path) -> dict[str, Any]:
    """What rebuilds a student of which there are tensors alone; what they do not tell is the teacher's."""
    tensors, kind = chosen.tensors, chosen.kind
    assert kind is not None
    config: dict[str, Any] = {}
    try:
        if kind.role == "dd2":
            say(f"{path}: nothing says at which flow time its head takes the noise; 1 is assumed")
            config["head_width"] = tensors["velocity_head.input.weight"].shape[0]
            config["head_depth"] = count(tensors, r"velocity_head\.blocks\.(\d+)\.")
        known = {**family.sizes, **family.student_config(tensors, kind.role, teacher)}
    except (KeyError, IndexError) as error:
        raise DDFastError(f"{path} is not complete, {kind} though it is: {error} is missing") from error
    return config | {name: value for name, value in known.items() if value is not None}

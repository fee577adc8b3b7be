"""What ddfast knows of a family of teachers beside the networks themselves: its configuration and its files.

A family is a folder in `ddfast/models` with `network.py`, `tokenizer.py` and `files.py`, or a class of the user's
(docs/adding-a-teacher.md); `ddfast.models.families` lists them.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ddfast.config import (
    PretrainedTeacherConfig,
    TeacherConfig,
    TokenizerConfig,
    TrainConfig,
    config_hash,
    plain,
    update,
)
from ddfast.env import cache_dir
from ddfast.errors import DDFastError
from ddfast.files import expect, reading
from ddfast.models.autoregressive import SamplingDefaults
from ddfast.models.checkpoint import (
    AnyTensor,
    build_around,
    cached,
    cast_float,
    check_fits,
    check_layers,
    load_state,
    load_tensors,
    one_dtype,
    read_checkpoint,
    read_tensor,
    save_tensors,
    storable,
)
from ddfast.models.flow_network import TransformerFlowNetwork
from ddfast.models.official import TOKENIZER, Said, checkpoint_file, count, largest_set
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student, TransformerStudent
from ddfast.models.tokenizers import ImageTokenizer
from ddfast.progress import Progress

Made = TypeVar("Made", bound=Teacher)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What a teacher is built of.

    Attributes:
        tensors, source: the transformer's, or the whole teacher's, and their file.
        header: what a file of ours says beside its tensors.
        tokenizer, tokenizer_source: tensors and file of a tokenizer that is not among `tensors`.
        config: what the user says.
        stored, tokenizer_stored: what the files say about themselves.
        dtype, defaults: as in `ddfast.load_teacher`.
    """

    tensors: Mapping[str, AnyTensor]
    source: Path
    header: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: Mapping[str, AnyTensor] = dataclasses.field(default_factory=dict)
    tokenizer_source: Path = Path()
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    stored: list[Said] = dataclasses.field(default_factory=list)
    tokenizer_stored: list[Said] = dataclasses.field(default_factory=list)
    dtype: torch.dtype | None = None
    defaults: SamplingDefaults | None = None

    def around(
        self, tokenizer: ImageTokenizer, make: Callable[[], Made], *, head: str, derived: tuple[str, ...]
    ) -> Made:
        """The teacher that `make` builds, around its tensors and its finished tokenizer.

        Args:
            tokenizer: of the teacher.
            make: builds it.
            head: name of its last layer's weight [V, W].
            derived: as in `Family`.

        Raises:
            DDFastError: the tokenizer has another number of codes, or tensors do not fit.
        """
        codes, modelled = len(tokenizer.codebook()), self.tensors[head].shape[0]
        if modelled != codes:
            raise DDFastError(
                f"{self.tokenizer_source} has {codes} codes, but {self.source} models {modelled}: they do not belong "
                "together"
            )
        dtype = self.dtype or one_dtype(self.tensors, self.source)
        own = {name: value for name, value in self.tensors.items() if not name.startswith(TOKENIZER)}
        of_tokenizer = {TOKENIZER + name: value for name, value in tokenizer.state_dict().items()}
        return build_around(make, own, self.source, derived=derived, dtype=dtype, beside=of_tokenizer)


class FeatureNetwork(Protocol):
    """A classifier of images in whose features Fréchet distances are taken."""

    def features(self, images: Tensor) -> Tensor:
        """Features [B, F] of images [B, C, H, W] in [0, 1]."""

    def logits(self, features: Tensor) -> Tensor:
        """Class logits of features [B, F]."""


class Family(ABC):
    """A family of teachers; of the user's own, `untrained` and `name`, `teacher`, `config` and `sizes` are enough.

    Attributes:
        name: as files and commands call it.
        teacher: class of its teachers. Each holds what rebuilds it: `teacher.config`, a `config`, and where it has a
            tokenizer with settings, `teacher.tokenizer.config`, a `tokenizer_config`.
        config: class of their configuration in recipes; one that derives from `PretrainedTeacherConfig` reads its
            weights from files.
        tokenizer_config: class of their tokenizers' configuration.
        students: class of the student of every method.
        sizes: arguments of these classes that the teacher does not give (`TransformerStudent`: width, depth, heads).
        title: what messages call it; empty: its name.
        signs: by role ("teacher", "tokenizer"), names of tensors that tell its files from others'; three are enough.
        derived: buffers of official files that follow from the sizes: recomputed, not read.
        tokenizer_file: example of the second official file of a teacher; empty: the teacher's file is all.
    """

    name: ClassVar[str]
    teacher: ClassVar[type[Teacher]]
    config: ClassVar[type[TeacherConfig]]
    tokenizer_config: ClassVar[type[TokenizerConfig]] = TokenizerConfig
    students: ClassVar[Mapping[str, type[Student]]] = {"dd1": TransformerStudent, "dd2": TransformerFlowNetwork}
    sizes: ClassVar[Mapping[str, Any]] = {}
    title: ClassVar[str] = ""
    signs: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    derived: ClassVar[tuple[str, ...]] = ()
    tokenizer_file: ClassVar[str] = ""

    # From a configuration ----------------------------------------------------------------------------------------

    @abstractmethod
    def untrained(self, config: TrainConfig) -> Teacher:
        """A teacher of the configuration's sizes with random weights, on the CPU."""

    def build(self, config: TrainConfig, progress: Progress | None = None) -> Teacher:
        """The configuration's teacher, on the CPU: here its file's tensors in an untrained one.

        Args:
            config: of a run.
            progress: called while it is trained, where it is.

        Raises:
            DDFastError: the file is missing, unsafe or of other sizes than the configuration's.
        """
        assert isinstance(config.teacher, PretrainedTeacherConfig)
        path = checkpoint_file(config.teacher.weights)
        content, header = read_checkpoint(path)
        self._check_settings(config, header, path)
        made = self.untrained(config)
        load_state(made, _read(largest_set(content, path)), path)
        return made.eval().requires_grad_(False)

    def _check_settings(self, config: TrainConfig, header: Mapping[str, Any], path: Path) -> None:
        """Raise where a file of ours says that its teacher was made in another way than the recipe does."""
        if header.get("family", self.name) != self.name:
            raise DDFastError(f"{path} is a teacher of the family {header['family']!r}, the recipe's is {self.name!r}")
        for table, settings in (("tokenizer", config.tokenizer), ("teacher", config.teacher)):
            mine = _settings(settings)
            for name, value in header.get(table, {}).items():
                if name in mine and mine[name] != value and name not in _FREE:
                    raise DDFastError(
                        f"{path} was made with {name} {value!r}, the recipe has {mine[name]!r} "
                        f"(--{table}.{name.replace('_', '-')})"
                    )

    def said(self, config: TeacherConfig) -> dict[str, Any]:
        """What a configuration says of a teacher in official files, by official names."""
        return {}

    def conditioned(self, teacher: Teacher, config: TeacherConfig) -> Teacher:
        """The teacher with what its conditions need beside its weights."""
        return teacher

    # From files and to them --------------------------------------------------------------------------------------

    def read(self, parts: Parts) -> Teacher:
        """The teacher of a file: here of one that `describe` describes.

        Raises:
            DDFastError: the file does not say how it was made, or its tensors do not fit.
        """
        if parts.config:
            name = ", ".join(sorted(parts.config))
            raise DDFastError(f"{name}: a {self.name} teacher's file holds its tokenizer and all of its settings")
        try:
            config = TrainConfig(
                tokenizer=_configured(self.tokenizer_config, parts.header["tokenizer"]),
                teacher=_configured(self.config, parts.header["teacher"]),
            )
        except (KeyError, TypeError, ValueError, DDFastError) as error:
            lacks = f"{parts.source} does not say how its {self.name} teacher was made ({error})"
            raise DDFastError(f"{lacks}; where a recipe says it, give the file as --teacher.weights") from error
        for settings in (parts.header["tokenizer"], parts.header["teacher"]):
            check_layers(settings, parts.tensors, parts.source)
        with reading(parts.source, f"is no {self.name} teacher of the sizes that it says"):
            check_fits(lambda: self.untrained(config), parts.tensors, parts.source)
        made = self.untrained(config)
        load_state(made, _read(parts.tensors), parts.source)
        for name, parameter in network_parameters(made):
            parameter.data = cast_float(parameter.data, parts.dtype or parts.tensors[name].dtype)
        made.defaults = parts.defaults or stored_defaults(parts.header, parts.source) or made.defaults
        return made.eval().requires_grad_(False)

    def read_tokenizer(self, parts: Parts) -> Any:
        """The tokenizer alone of a file; `parts.tensors` are its own.

        Raises:
            DDFastError: there is none, or its tensors do not fit.
        """
        teacher: Any = self.read(parts)
        if not hasattr(teacher, "tokenizer"):
            raise DDFastError(f"{parts.source}: a {self.name} teacher has no tokenizer")
        return teacher.tokenizer

    def describe(self, teacher: Any) -> dict[str, Any]:
        """What a teacher's file says beside its tensors, as `read` takes it."""
        tokenizer = getattr(getattr(teacher, "tokenizer", None), "config", None)
        if tokenizer is None:
            tokenizer = TokenizerConfig(num_codes=teacher.num_codes, code_dim=teacher.code_dim)
        if not isinstance(getattr(teacher, "config", None), self.config):
            name = f"{type(teacher).__name__}.config"
            raise DDFastError(f"{name}: expected the {self.config.__name__} that it was made with (ddfast.Family)")
        described = {"tokenizer": _settings(tokenizer), "teacher": _settings(teacher.config)}
        return described | {"defaults": dataclasses.asdict(teacher.defaults)}

    def save(self, path: Path, teacher: Teacher) -> None:
        """Write a teacher with its tokenizer and settings to one safetensors file, which `read` reads."""
        save_tensors(path, teacher.state_dict(), {"family": self.name, **self.describe(teacher)})

    def student_config(self, tensors: Mapping[str, AnyTensor], method: str, teacher: Teacher) -> dict[str, Any]:
        """What rebuilds a student of which there are tensors alone; None, and what is left out: the teacher's."""
        return {
            "width": tensors["class_embedding.weight"].shape[1],
            "depth": count(tensors, r"body\.blocks\.(\d+)\."),
        }

    def official_teacher(self, teacher: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The contents of a teacher's two official checkpoints, transformer and tokenizer.

        Raises:
            DDFastError: the family has no official layout.
        """
        raise DDFastError(f"{type(teacher).__name__} has no official layout; only VAR and LlamaGen have")

    def official_student(self, student: Any, averaged: dict[str, Tensor], live: dict[str, Tensor]) -> dict[str, Any]:
        """The content of a student's official checkpoint; errors as of `official_teacher`.

        Args:
            student: of the family.
            averaged, live: its tensors.
        """
        raise DDFastError(f"{type(student).__name__} has no official layout; only VAR's and LlamaGen's have")

    def usual(self, teacher: Any) -> dict[str, Any]:
        """Settings that official checkpoints have no place for, as the official code assumes them."""
        return {}

    def unusual(self, teacher: Any) -> dict[str, Any]:
        """Those of the `usual` settings that this teacher has otherwise."""
        usual = self.usual(teacher)
        own = {**vars(teacher.sizes), **teacher.tokenizer.config} if usual else {}
        return {name: own[name] for name, value in usual.items() if own[name] != value}

    # For evaluation ----------------------------------------------------------------------------------------------

    def feature_network(self, progress: Progress | None = None) -> FeatureNetwork | None:
        """The classifier of the family's images; None: there is none, and no Fréchet distance is measured."""
        return None

    def real_images(self, count: int, seed: int) -> Tensor:
        """Images [count, C, H, W] in [0, 1] that the samples are compared with, where there is a feature network."""
        raise DDFastError(f"family {self.name} has a feature_network: it needs real_images too")

    def __str__(self) -> str:
        return self.title or self.name


class FamilyOnFirstUse(Family):
    """A family whose teachers are trained on first use, and kept in the cache."""

    @abstractmethod
    def trained(self, config: TrainConfig, progress: Progress | None = None) -> Teacher:
        """A teacher of these settings and this seed, trained now."""

    def data(self) -> tuple[str, ...]:
        """What decides it beside the settings."""
        return ()

    def build(self, config: TrainConfig, progress: Progress | None = None) -> Teacher:
        """The teacher of these settings and this seed: from the cache, or trained now (minutes) and cached."""
        settings = config_hash(config.tokenizer, config.teacher, config.seed, *self.data())
        path = cache_dir() / f"{self.name}-teacher-{settings}.safetensors"
        return cached(
            path,
            lambda: build_around(lambda: self.untrained(config), load_tensors(path)[0], path),
            lambda: self.save(path, self.trained(config, progress)),
        )


def stored_defaults(header: Mapping[str, Any], source: object) -> SamplingDefaults | None:
    """The sampling settings that a file's header says; None: it says none.

    Raises:
        DDFastError: they are others than a teacher has.
    """
    try:
        return expect(header["defaults"], SamplingDefaults, "defaults") if header.get("defaults") else None
    except ValueError as error:
        raise DDFastError(f"{source} is damaged ({error})") from error


def network_parameters(teacher: Teacher) -> Iterator[tuple[str, nn.Parameter]]:
    """The transformer's parameters: all but the tokenizer's."""
    return (one for one in teacher.named_parameters() if not one[0].startswith(TOKENIZER))


def network_state(teacher: Teacher) -> dict[str, Tensor]:
    """The transformer's tensors as a file takes them: all but the tokenizer's."""
    state = {name: value for name, value in teacher.state_dict().items() if not name.startswith(TOKENIZER)}
    return storable(state)


_PLACES = ("weights", "random_weights")
"""Settings that say where weights come from: they are no business of whoever gets the file."""

_FREE = (*_PLACES, "dtype", *(field.name for field in dataclasses.fields(SamplingDefaults)))
"""Settings in which a recipe may differ from the file of its teacher's weights."""


def _settings(config: Any) -> dict[str, Any]:
    return {name: value for name, value in plain(config).items() if name not in _PLACES}


def _configured(kind: Any, values: dict[str, Any]) -> Any:
    """A configuration with values as JSON holds them."""
    required = [field.name for field in dataclasses.fields(kind) if field.default is field.default_factory]
    made = kind(**{name: values[name] for name in required})
    update(made, values)
    return made


def _read(tensors: Mapping[str, AnyTensor]) -> dict[str, Tensor]:
    return {name: read_tensor(value) for name, value in tensors.items()}

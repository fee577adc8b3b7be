"""A distilled generator as a folder or a Hugging Face repository: weights, settings and a model card.

generator = Generator.from_run("runs/digits")
generator.save_pretrained("dd1-digits")
images = Generator.from_pretrained("dd1-digits").images([3, 7], steps=2)  # of a teacher of text: texts([0, 0])
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ddfast
from ddfast.config import plain
from ddfast.errors import DDFastError, first_line
from ddfast.files import expect, parse_json, read_text, whole_folder, write_atomically
from ddfast.models.autoregressive import Condition, condition_size, on_device, take
from ddfast.models.layers import num_parameters
from ddfast.models.llamagen.captions import captions_for
from ddfast.models.loading import save_student, save_teacher
from ddfast.models.official import CONFIG_FILE, STUDENT_FILE, TEACHER_FILE
from ddfast.models.protocol import Teacher
from ddfast.models.student import DD1Student, Student
from ddfast.ops import nearest_code, noise
from ddfast.portable import shared_settings
from ddfast.progress import silent
from ddfast.report import quality_table, read_metrics
from ddfast.runs import CONFIG as RUN_CONFIG
from ddfast.runs import LOCATION, METRICS_JSON, STAGES, hashed_files, open_student, read_seconds, student_header
from ddfast.sampling import condition_index
from ddfast.trajectories.memory import fitting, largest_sampling_batch

try:
    from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
except ImportError as error:
    raise DDFastError("ddfast.hub needs huggingface_hub: pip install 'ddfast[hub]'") from error


_NAMES_HERE = {
    "cfg": "cfg_scale",
    "g_seed": "seed",
    "label_B": "classes",
    "labels": "classes",
    "class_labels": "classes",
    "prompts": "captions",
    "prompt": "captions",
}
"""What the official scripts call an argument of `Generator.images`, and what it is called here."""

_ADVICE = "save_pretrained writes them, and `ddfast convert` with --student"

_CARD = """# {title}

A {passes} {kind} generator, distilled from an auto-regressive teacher with Distilled Decoding
({paper}) by ddfast {version}.

## Use

```python
from ddfast.hub import Generator

generator = Generator.from_pretrained("{repository}")
{use}
```

## Teacher

{teacher}

## Recipe

{recipe}

## Cost

{cost}

## Evaluation

{evaluation}
"""


class Generator(ModelHubMixin, library_name="ddfast", license="apache-2.0", tags=["distilled-decoding"]):
    """A student with its teacher (which holds the tokenizer), saved and loaded together.

    Args:
        teacher: decodes images, and takes part in teacher-involved sampling.
        student: the distilled network.
        point: t1, where a second step of a DD1 student starts; None: the student's own.
        card: texts of the model card: recipe, cost, evaluation; what is missing is said to be unknown.
    """

    def __init__(
        self, teacher: Teacher, student: Student, *, point: int | None = None, card: dict[str, str] | None = None
    ) -> None:
        self.teacher, self.student, self.card = teacher, student, dict(card or {})
        if point is not None:
            self.point = point

    @property
    def point(self) -> int | None:
        """t1, where a second step starts; None: the method has none."""
        return self.student.point if isinstance(self.student, DD1Student) else None

    @point.setter
    def point(self, point: int | None) -> None:
        """Of a DD1 student."""
        if isinstance(self.student, DD1Student):
            self.student.point = point

    @classmethod
    def from_run(
        cls,
        folder: str | Path,
        *,
        device: str = "cpu",
        weights: str | Path | None = None,
        tokenizer: str | Path | None = None,
    ) -> Generator:
        """The generator of a finished `ddfast train` run, with what its files say of recipe, cost and evaluation.

        Args:
            folder: of the run, or one with its student.safetensors.
            device: where to run.
            weights, tokenizer: files of its teacher, where they are not where the run found them.

        Raises:
            DDFastError: the folder holds no finished run.
        """
        folder = Path(folder)
        files = {"teacher.weights": weights, "tokenizer.weights": tokenizer}
        config, teacher, student = open_student(folder, device, silent, files=files)
        settings = {name: value for name, value in plain(config).items() if name not in LOCATION}
        hashes = student_header(folder).get("files") or hashed_files(config)  # of before: none
        told = shared_settings(settings, hashes)
        card = {"recipe": f"`{config.recipe}`; every setting:\n\n```toml\n{told}```"}
        if (folder / STAGES).exists():
            seconds = read_seconds(folder / STAGES)
            card["cost"] = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items()) + f" on {device}."
        if (folder / METRICS_JSON).exists():
            card["evaluation"] = "\n".join(quality_table(config, read_metrics(folder / METRICS_JSON), student))
        return cls(teacher, student, card=card)

    @torch.no_grad()
    def images(
        self,
        classes: Sequence[int] | None = None,
        *,
        captions: Path | str | Sequence[str] | tuple[Tensor, Tensor] | None = None,
        steps: int = 1,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 0,
        **guidance: Any,
    ) -> Tensor:
        """Images float32 [B, C, H, W] in [0, 1], one per class or caption.

        Args:
            classes: labels; of a text generator that has captions (`from_run`), their numbers.
            captions: for a text generator: texts, a file of them or of features (a `Path`), or (features, mask).
            steps: DD1: 1 or 2 passes, with later points more; DD2: one pass, then steps - 1 groups of the teacher's.
            seed, first_index: image i has the noise (seed, first_index + i), whatever the batch.
            batch_size: images made at a time; 0: as many as free memory holds.
            guidance: `refine`, and settings of the teacher's part where it has one, as of `Student.sample`: cfg_scale,
                top_k, ...

        Raises:
            TypeError, ValueError: an argument is unknown, is not as above, or has no effect; or the teacher has no
                image tokenizer (`codes` needs none).
            DDFastError: captions cannot be read or encoded, or a batch does not fit in memory.
        """
        if not self.teacher.has_decoder:
            kind, other = type(self.teacher).__name__, "texts" if self.teacher.makes_text() else "codes"
            raise TypeError(f"{kind} has no image tokenizer: `{other}` gives the samples' {other}")
        condition = self._condition(classes, captions, guidance)
        return self._sampled(condition, self.teacher.decode, steps, seed, first_index, batch_size, guidance)

    @torch.no_grad()
    def codes(
        self,
        classes: Sequence[int] | None = None,
        *,
        captions: Path | str | Sequence[str] | tuple[Tensor, Tensor] | None = None,
        steps: int = 1,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 0,
        **guidance: Any,
    ) -> Tensor:
        """Codes int64 [B, N] of the same samples; arguments and errors as of `images`."""
        nearest = partial(nearest_code, codebook=self.teacher.codebook)
        condition = self._condition(classes, captions, guidance)
        return self._sampled(condition, nearest, steps, seed, first_index, batch_size, guidance)

    def texts(self, classes: Sequence[int] | None = None, **settings: Any) -> list[str]:
        """Texts of the same samples, where the teacher is one of text; arguments and errors as of `images`.

        Raises:
            TypeError: it is none.
        """
        if not self.teacher.makes_text():
            raise TypeError(f"{type(self.teacher).__name__} makes no text: `codes` gives the samples' codes")
        return self.teacher.texts(self.codes(classes, **settings))

    def _sampled(
        self,
        condition: Condition,
        become: Callable[[Tensor], Tensor],
        steps: int,
        seed: int,
        first_index: int,
        batch_size: int,
        guidance: dict[str, Any],
    ) -> Tensor:
        """What `become` makes of the samples' embeddings [B, N, D], batch by batch."""
        count, device = condition_size(condition), self.teacher.codebook.device
        settings = {**self.student.settings(steps), **guidance}
        if first_index < 0 or batch_size < 0:
            raise ValueError(f"first_index, batch_size: got {first_index}, {batch_size}, expected at least 0")
        if not batch_size:
            batch_size = 1
            if count > 1:
                batch_size = largest_sampling_batch(
                    self.teacher,
                    self.student,
                    decodes="teacher_range" in settings or bool(settings.get("refine")),
                    images=self.teacher.has_decoder,
                    condition=take(condition, torch.zeros(1, dtype=torch.int64, device=device)),
                )
        index = torch.arange(first_index, first_index + count, dtype=torch.int64)
        shape, made = (self.teacher.num_tokens, self.teacher.code_dim), []
        for rows in torch.arange(count, dtype=torch.int64).split(batch_size) if count else (index,):
            part = take(condition, rows.to(device))
            with fitting(len(rows), device, "the batch size"):
                embeddings = self.student.sample(part, noise(seed, index[rows], shape, device), **settings)
                made.append(become(embeddings))
        return torch.cat(made)

    def _condition(self, classes: Sequence[int] | None, captions: Any, guidance: dict[str, Any]) -> Condition:
        """One condition per image, on the teacher's device, checked."""
        for name in guidance:
            if name in _NAMES_HERE:
                raise TypeError(f"{name}: here it is called {_NAMES_HERE[name]}")
        if (classes is None) == (captions is None):
            raise ValueError(f"classes: got {'neither' if classes is None else 'both'} of classes and captions")
        device = self.teacher.codebook.device
        if captions is None:
            assert classes is not None
            given = classes.tolist() if isinstance(classes, Tensor) else classes
            index = condition_index(self.teacher, given) if len(given) else torch.empty(0, dtype=torch.int64)
            return self.teacher.condition_of(index.to(device))
        pair = isinstance(captions, tuple) and all(isinstance(part, Tensor) for part in captions)
        made = captions if pair else captions_for(self.teacher, captions, device=device)
        self.teacher.check_condition(made)
        return on_device(made, device)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **settings: Any,
    ) -> str | None:
        """Write the folder, all of it or nothing, and push it if asked to; as `ModelHubMixin.save_pretrained`.

        Raises:
            DDFastError: it cannot be written, or not be pushed.
        """
        folder = Path(save_directory).absolute()
        with whole_folder(folder, last=CONFIG_FILE) as temporary:
            if (folder / "README.md").exists():  # a card that somebody may have written to is kept
                shutil.copyfile(folder / "README.md", temporary / "README.md")
            super().save_pretrained(temporary, model_card_kwargs=model_card_kwargs)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **settings)

    def push_to_hub(self, repo_id: str, **settings: Any) -> str:
        """Upload the folder; the arguments are `ModelHubMixin.push_to_hub`'s.

        Raises:
            DDFastError: it cannot be uploaded.
        """
        return _from_the_hub(partial(super().push_to_hub, repo_id, **settings), repo_id)

    def _save_pretrained(self, save_directory: Path) -> None:
        folder = Path(save_directory)
        save_teacher(folder / TEACHER_FILE, self.teacher)
        save_student(folder / STUDENT_FILE, self.student, {})
        config = {"ddfast": ddfast.__version__, "point": self.point, "student": self.student.config, "card": self.card}
        config |= {"family": type(self.teacher).__name__, "num_tokens": self.teacher.num_tokens}
        write_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2, default=list) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        device: str = "cpu",
        **unknown: Any,
    ) -> Generator:
        """The generator of a folder (`save_pretrained`'s, or `ddfast convert`'s with a student), or of a repository.

        Args:
            pretrained_model_name_or_path: a folder, or USER/NAME.
            revision, cache_dir, force_download, local_files_only, token: of the download, as in `huggingface_hub`.
            device: where to run.
            unknown: raises.

        Raises:
            TypeError: an argument is unknown.
            DDFastError: there is no such folder or repository, it cannot be reached, or it holds something else.
        """
        if unknown:
            known = "revision, cache_dir, force_download, local_files_only, token, device"
            raise TypeError(f"{next(iter(unknown))}: no argument of from_pretrained; known: {known}")
        name = str(pretrained_model_name_or_path)
        folder = Path(os.path.expanduser(name))
        if not folder.is_dir():
            repository = isinstance(pretrained_model_name_or_path, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)
            if not repository:
                raise DDFastError(f"no folder {name} here; give a folder with a generator, or a repository, USER/NAME")
            settings = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download}
            settings |= {"local_files_only": local_files_only, "token": token}
            patterns = ["*.json", "*.safetensors"]
            download = partial(snapshot_download, name, allow_patterns=patterns, **settings)
            folder = Path(_from_the_hub(download, f"{name} is no folder here, and no repository that can be read"))
        return cls._from_folder(folder, device)

    @classmethod
    def _from_folder(cls, folder: Path, device: str) -> Generator:
        missing = [file for file in (CONFIG_FILE, TEACHER_FILE, STUDENT_FILE) if not (folder / file).is_file()]
        if missing:
            run = (folder / RUN_CONFIG).is_file()
            advice = "it is a training run: use Generator.from_run" if run else _ADVICE
            raise DDFastError(f"{folder} holds no generator of ddfast (no {', '.join(missing)}); {advice}")
        try:
            config = expect(parse_json(read_text(folder / CONFIG_FILE)), dict[str, Any])
            card = expect(config.get("card", {}), dict[str, str], "card")
        except ValueError as error:
            raise DDFastError(f"{folder} holds no generator of ddfast ({CONFIG_FILE}: {error})") from error
        _, teacher, student = open_student(folder, device, silent)
        return cls(teacher, student, card=card)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card: teacher, recipe, cost and evaluation protocol."""
        teacher = self.teacher
        network = sum(p.numel() for name, p in teacher.named_parameters() if not name.startswith("tokenizer."))
        student = num_parameters(self.student)
        kind, use = "image", "images = generator.images([0, 1, 2], steps=1)  # float32 [3, C, H, W] in [0, 1]"
        if teacher.makes_text():
            kind, use = "text", "texts = generator.texts([0, 0, 0], steps=1)  # three of them; 0 is the only class"
        data = ModelCardData(
            library_name="ddfast", license="apache-2.0", tags=["distilled-decoding", f"{kind}-generation"]
        )
        text = _CARD.format(
            title=kwargs.get("title", f"Distilled {type(teacher).__name__}"),
            passes="one- or two-step",
            kind=kind,
            use=use,
            paper=self.student.paper,
            version=ddfast.__version__,
            repository=kwargs.get("repo_id", "FOLDER"),
            teacher=f"{type(teacher).__name__}, {network / 1e6:.1f} M parameters, {teacher.num_tokens} tokens of "
            f"{teacher.num_codes} codes in {len(teacher.groups)} steps; the student has {student / 1e6:.1f} M. "
            f"Sampling settings that it learnt to reproduce: {teacher.defaults}.",
            **{name: self.card.get(name, "Unknown.") for name in ("recipe", "cost", "evaluation")},
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _from_the_hub(call: Callable[[], Any], source: object) -> Any:
    """What a call of huggingface_hub gives; what ends it is one line, whichever library below it raised."""
    try:
        return call()
    except DDFastError:
        raise
    except Exception as error:  # huggingface_hub's, its HTTP library's and the system's: they differ by version
        advice = "check the name, the connection, and `hf auth login` for a private one"
        raise DDFastError(f"{source}: {type(error).__name__}: {first_line(error)}; {advice}") from error

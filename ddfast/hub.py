"""A distilled generator as a folder or a Hugging Face repository: weights, settings and a model card.

generator = Generator.from_run("runs/digits")
generator.save_pretrained("dd1-digits")
images = Generator.from_pretrained("dd1-digits").images([3, 7], steps=2)
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import Tensor

import ddfast
from ddfast.errors import DDFastError
from ddfast.files import write_atomically
from ddfast.models.loading import load_student, load_teacher, save_student, save_teacher
from ddfast.models.official import STUDENT_FILE, TEACHER_FILE
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.ops import noise
from ddfast.pipeline import LOCATION, METRICS_JSON, STAGES, open_student, plain
from ddfast.report import quality_table

try:
    from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
except ImportError as error:
    raise DDFastError("ddfast.hub needs huggingface_hub: pip install 'ddfast[hub]'") from error

CONFIG_FILE = "config.json"

_CARD = """# {title}

A {passes} image generator, distilled from an auto-regressive teacher with Distilled Decoding
([DD1, arXiv 2412.17153](https://arxiv.org/abs/2412.17153)) by ddfast {version}.

## Use

```python
from ddfast.hub import Generator

generator = Generator.from_pretrained("{repository}")
images = generator.images([0, 1, 2], steps=1)  # float32 [3, C, H, W] in [0, 1]
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
        point: t1, where a second step starts.
        card: texts of the model card: recipe, cost, evaluation; what is missing is said to be unknown.
    """

    def __init__(self, teacher: Teacher, student: Student, *, point: int, card: dict[str, str] | None = None) -> None:
        self.teacher, self.student, self.point = teacher, student, point
        self.card = dict(card or {})

    @classmethod
    def from_run(cls, folder: str | Path, *, device: str = "cpu") -> Generator:
        """The generator of a finished `ddfast train` run, with what its files say of recipe, cost and evaluation.

        Raises:
            DDFastError: the folder holds no finished run.
        """
        folder = Path(folder)
        config, teacher, student = open_student(folder, device, lambda done, total, text: None)
        settings = _shareable({name: value for name, value in plain(config).items() if name not in LOCATION})
        card = {"recipe": f"`{config.recipe}`; every setting:\n\n```toml\n{tomli_w.dumps(settings)}```"}
        if (folder / STAGES).exists():
            seconds = json.loads((folder / STAGES).read_text())
            card["cost"] = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items()) + f" on {device}."
        if (folder / METRICS_JSON).exists():
            card["evaluation"] = "\n".join(quality_table(config, json.loads((folder / METRICS_JSON).read_text())))
        return cls(teacher, student, point=config.dd1.point, card=card)

    @torch.no_grad()
    def images(self, classes: Sequence[int], *, steps: int = 1, seed: int = 0, first_index: int = 0) -> Tensor:
        """Images float32 [B, C, H, W] in [0, 1], one per class (text teachers: one per caption number).

        Args:
            classes: labels.
            steps: DD1: 1 or 2 passes; DD2: one pass, then steps - 1 groups of the teacher's.
            seed, first_index: image i has the noise (seed, first_index + i), whatever the batch.
        """
        teacher = self.teacher
        device = teacher.codebook.device
        index = torch.arange(first_index, first_index + len(classes), dtype=torch.int64)
        start = noise(seed, index, (teacher.num_tokens, teacher.code_dim), device)
        condition = teacher.condition_of(torch.tensor(list(classes), dtype=torch.int64, device=device))
        return teacher.decode(self.student.sample(condition, start, **self.student.settings(steps, self.point)))

    def _save_pretrained(self, save_directory: Path) -> None:
        folder = Path(save_directory)
        save_teacher(folder / TEACHER_FILE, self.teacher)
        save_student(folder / STUDENT_FILE, self.student, {"point": self.point})
        config = {"ddfast": ddfast.__version__, "point": self.point, "student": self.student.config, "card": self.card}
        config |= {"family": type(self.teacher).__name__, "num_tokens": self.teacher.num_tokens}
        write_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2, default=list) + "\n")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        device: str = "cpu",
        **_: Any,
    ) -> Generator:
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=["*.json", "*.safetensors"],
                )
            )
        try:
            config = json.loads((folder / CONFIG_FILE).read_text())
            point, card = int(config["point"]), config["card"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DDFastError(f"{folder} holds no generator of ddfast ({error})") from error
        teacher = load_teacher(folder).to(device)
        return cls(teacher, load_student(folder, teacher), point=point, card=card)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card: teacher, recipe, cost and evaluation protocol."""
        teacher = self.teacher
        network = sum(p.numel() for name, p in teacher.named_parameters() if not name.startswith("tokenizer."))
        student = sum(p.numel() for p in self.student.parameters())
        data = ModelCardData(
            library_name="ddfast", license="apache-2.0", tags=["distilled-decoding", "image-generation"]
        )
        text = _CARD.format(
            title=kwargs.get("title", f"Distilled {type(teacher).__name__}"),
            passes="one- or two-step",
            version=ddfast.__version__,
            repository=kwargs.get("repo_id", "FOLDER"),
            teacher=f"{type(teacher).__name__}, {network / 1e6:.1f} M parameters, {teacher.num_tokens} tokens of "
            f"{teacher.num_codes} codes in {len(teacher.groups)} steps; the student has {student / 1e6:.1f} M. "
            f"Sampling settings that it learnt to reproduce: {teacher.defaults}.",
            **{name: self.card.get(name, "Unknown.") for name in ("recipe", "cost", "evaluation")},
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _shareable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings whose paths are reduced to the file's name: a card goes to people who know no folder of this machine."""
    return {
        name: _shareable(value)
        if isinstance(value, dict)
        else Path(value).name
        if isinstance(value, str) and os.path.isabs(value)
        else value
        for name, value in settings.items()
    }

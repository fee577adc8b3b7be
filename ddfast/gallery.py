"""What a report shows of samples: student and teacher from the same noise, failures, and what lies between two noises.

Dimensions: B batch, N tokens, D code dimension, H height, W width.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ddfast import processes, seeds
from ddfast.config import TrainConfig
from ddfast.evaluation.protocol import sample_seed
from ddfast.evaluation.sources import SOURCES, stream
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.ops import nearest_code
from ddfast.page import Galleries, Gallery, Strip, Table
from ddfast.pictures import decoded, pixels
from ddfast.sampling import Request, condition_index, conditions_of, one_line

_SMALL, _LARGEST = 64, 160
"""Sides in pixels: up to which a picture is kept as it is, and what a larger one is reduced to."""

_COMPARED = ("ode_pairs", "student_1step", "student_2step")
"""What the same noise is given to."""


def same_noise(
    config: TrainConfig, teacher: Teacher, student: Student, *, columns: int = 6, rows: int = 10
) -> tuple[list[int], dict[str, Tensor]]:
    """Pixels of the teacher's flow and the student's one and two steps from the same noise, for some conditions.

    Several processes share what is to be sampled, and the first one gets it.

    Returns:
        The conditions, evenly spread over all, and by title, conditions in turn, uint8 [columns x conditions, 3, H, W],
        or of a teacher without image decoder codes int64 [columns x conditions, N].
    """
    shown, found = spread(teacher, rows), {}
    for source in _COMPARED:
        batches = stream(
            source,
            teacher,
            student,
            count=len(shown) * columns,
            seed=seeds.derived(config.seed, 3_000_003),
            classes=shown,
            batch_size=min(config.evaluation.batch_size, 64),
        )
        decodes = teacher.has_decoder
        made = processes.collected([decoded(batch, teacher) if decodes else batch.codes.cpu() for batch in batches])
        found[_title(source, student)] = torch.cat(made) if made else torch.empty(0, dtype=torch.uint8)
    return shown, found


def spread(teacher: Teacher, most: int) -> list[int]:
    """Up to so many of a teacher's conditions, evenly spread over all."""
    count = teacher.num_conditions
    return [number * count // min(count, most) for number in range(min(count, most))]


def by_condition(teacher: Teacher, shown: Sequence[int], found: Mapping[str, Tensor]) -> Galleries:
    """What `same_noise` made: a gallery per condition, a strip per source."""
    galleries = []
    for place, condition in enumerate(shown):
        strips = [
            Strip(name=title, images=[data_uri(one) for one in own[place :: len(shown)]])
            for title, own in found.items()
        ]
        galleries.append(Gallery(title=_name(teacher, condition), strips=strips, pixelated=_are_small(found.values())))
    return Galleries(galleries=galleries)


def as_texts(teacher: Teacher, found: Mapping[str, Tensor]) -> Table:
    """What `same_noise` made of a teacher of text: a column per source."""
    columns = [map(one_line, teacher.texts(codes)) for codes in found.values()]
    rows = [[str(place), *texts] for place, texts in enumerate(zip(*columns, strict=True))]
    return Table(head=["noise", *found], rows=rows, notes="¶: an end of line.")


def failures(config: TrainConfig, metrics: Mapping[str, Any], student: Student) -> Galleries | Table | None:
    """The one-step samples that the teacher finds least likely, each beside the teacher's own from the same noise.

    They are those of the figures, made again; in codes where the teacher has no decoder. None: the figures do not say
    which they were.
    """
    numbers = metrics.get("student_1step", {}).get("least_likely", {}).get("number", [])
    if not numbers:
        return None
    teacher, number = student.teacher, torch.tensor(numbers, dtype=torch.int64)
    sources = {source: _title(source, student) for source in ("ode_pairs", "student_1step")}
    made = [_made(source, teacher, student, sample_seed(config), number) for source in sources]
    codes = [nearest_code(one, teacher.codebook) for one in made]
    conditions = _conditions(teacher, number)
    values = [_likelihoods(teacher, one, conditions) for one in codes]
    # As measured: rounding differs in another batch.
    values[1] = metrics["student_1step"]["least_likely"]["teacher_nll"]
    names = [_name(teacher, condition) for condition in conditions.tolist()]
    if not teacher.has_decoder:
        return _as_codes(teacher, numbers, names, list(sources.values()), values, codes)
    images = [pixels(teacher.decode(one, clamp=False)) for one in made]
    galleries = []
    for place, name in enumerate(names):
        strips = [
            Strip(name=title, images=[data_uri(own[place])], told=f"{likelihoods[place]:.3f}")
            for title, own, likelihoods in zip(sources.values(), images, values, strict=True)
        ]
        galleries.append(Gallery(title=name, strips=strips, pixelated=_are_small(images)))
    return Galleries(galleries=galleries, small=True)


_SHOWN_CODES = 24


def _as_codes(
    teacher: Teacher,
    numbers: list[int],
    names: list[str],
    titles: list[str],
    values: list[list[float]],
    codes: list[Tensor],
) -> Table:
    """Failures where there are no pictures."""
    first = f"first {_SHOWN_CODES} codes" if codes[0].shape[1] > _SHOWN_CODES else "codes"
    shown = [[" ".join(map(str, row)) for row in own[:, :_SHOWN_CODES].tolist()] for own in codes]
    if teacher.makes_text():
        first, shown = "text", [[one_line(text) for text in teacher.texts(own)] for own in codes]
    rows = []
    for place, (number, name) in enumerate(zip(numbers, names, strict=True)):
        sample = f"{number}, {name}" if teacher.num_conditions > 1 else str(number)
        told = [f"{own[place]:.3f}" for own in values]
        rows.append([sample, *told, *(own[place] for own in shown)])
    head = ["sample", *(f"NLL/token, {title}" for title in titles), *(f"{first}, {title}" for title in titles)]
    return Table(head=head, rows=rows)


def paths(student: Student, made: Mapping[Student | None, Tensor], conditions: Sequence[int]) -> Galleries:
    """Interpolations uint8 [count, frames, 3, H, W] of the teacher (None) and the student, a gallery per path."""
    galleries = []
    for place, condition in enumerate(conditions):
        strips = [
            Strip(
                name=_title("ode_pairs" if who is None else "student_1step", student),
                images=[data_uri(frame) for frame in frames[place]],
            )
            for who, frames in made.items()
        ]
        title = _name(student.teacher, condition)
        galleries.append(Gallery(title=title, strips=strips, pixelated=_are_small(made.values())))
    return Galleries(galleries=galleries)


def data_uri(image: Tensor) -> str:
    """A picture uint8 [3, H, W] as a data URI: a PNG as it is, or reduced and as JPEG if it is large."""
    picture = Image.fromarray(rearrange(image, "c h w -> h w c").contiguous().numpy())
    written = BytesIO()
    if max(picture.size) > _SMALL:
        picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
        picture.save(written, "JPEG", quality=88)
    else:
        picture.save(written, "PNG", optimize=True)
    kind = "jpeg" if max(image.shape[-2:]) > _SMALL else "png"
    return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode()}"


def _made(source: str, teacher: Teacher, student: Student, seed: int, number: Tensor) -> Tensor:
    """Embeddings [B, N, D] of these samples of a seed, with the conditions that they have among all."""
    index = _conditions(teacher, number).to(teacher.codebook.device)
    request = Request(teacher=teacher, student=student, seed=seed, number=number, index=index)
    with torch.no_grad(), processes.busy():
        return SOURCES[source].maker(teacher)(request)


def _conditions(teacher: Teacher, number: Tensor) -> Tensor:
    return conditions_of(number, condition_index(teacher), "uniform", 0)


def _likelihoods(teacher: Teacher, codes: Tensor, conditions: Tensor) -> list[float]:
    """Nats per token of each sample under the teacher, unfiltered."""
    with torch.no_grad():
        log_probs = teacher.log_probs(teacher.condition_of(conditions.to(codes.device)), codes, filtered=False)
    return (-log_probs.gather(-1, codes[..., None])[..., 0].double().mean(-1)).tolist()


def _title(source: str, student: Student) -> str:
    """What a source's pictures are called."""
    return (SOURCES[source].picture or "teacher").format(method=student.method.upper())


def _name(teacher: Teacher, condition: int) -> str:
    return f"{'class' if teacher.num_classes else 'caption'} {condition}"


def _are_small(found: Iterable[Tensor]) -> bool:
    return all(max(one.shape[-2:]) <= _SMALL for one in found)

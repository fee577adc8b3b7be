"""Paths in noise: how far images move along them, and pictures of the way.

A path is the great arc between two noises of one class; docs/method.md section 16 (Evaluation).

Source: Karras et al. 2019, arXiv 1812.04948 (StyleGAN), section 4.1 (Perceptual path length), of whole paths.

Dimensions: B batch, N tokens, D code dimension, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from ddfast import processes
from ddfast.config import EvaluationConfig
from ddfast.distill.lpips import LPIPS
from ddfast.models import families
from ddfast.models.autoregressive import Condition
from ddfast.models.decoding import release_graphs
from ddfast.models.family import FeatureNetwork
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.ops import noise
from ddfast.pictures import pixels
from ddfast.precision import without_tf32
from ddfast.sampling import condition_index
from ddfast.trajectories.memory import BATCH_OPTION, fitting

STEP = 1e-4
"""Along a path of length 1: by how much a noise is moved."""

_AT_A_TIME = 32
"""Pairs of images decoded and compared at a time: that takes far more memory than making their tokens."""

Move: TypeAlias = Callable[[Condition, Tensor], Tensor]
"""Embeddings [B, N, D] that a condition and noise [B, N, D] are mapped to."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Of two sets of images [B, C, H, W], raw as decoders give them (about [-1, 1]): float [B]; what is squared is so.

    `name` is told beside every figure: those of two distances have nothing to do with each other.
    """

    name: str
    between: Callable[[Tensor, Tensor], Tensor]


def path_distance(config: EvaluationConfig, teacher: Teacher) -> Distance | None:
    """The distance in which a teacher's paths are measured; None: they are not.

    LPIPS where the user gives its weights, else the square of that in the features of the family's own network, if it
    has one.

    Raises:
        ValueError: LPIPS is asked for, and there are no images.
        DDFastError: its files are missing, damaged or others.
    """
    if config.lpips_vgg and not teacher.has_decoder:
        raise ValueError(f"lpips_vgg: got a file, but {type(teacher).__name__} has no image tokenizer")
    if not config.paths or not teacher.has_decoder:
        return None
    if config.lpips_vgg:
        lpips = LPIPS.load(Path(config.lpips_vgg), Path(config.lpips_linear))
        return Distance(name="lpips", between=lpips.to(teacher.codebook.device).requires_grad_(False))
    network = processes.first_then_all(families.of_teacher(teacher).feature_network)
    return None if network is None else Distance(name="features", between=partial(_feature_distance, network))


def _feature_distance(network: FeatureNetwork, images: Tensor, others: Tensor) -> Tensor:
    one, other = (network.features(((raw + 1) / 2).clamp(0, 1).cpu()) for raw in (images, others))
    return (one - other).square().sum(1)


def flow_of(teacher: Teacher) -> Move:
    """The teacher's own map from noise, that its training pairs are of: every token is a code, so it has steps."""
    return lambda condition, eps: teacher.embed(teacher.generate(condition, sampler="flow", noise=eps))


def step_of(student: Student, *, split: int | None = None) -> Move:
    """A student's map in one step, from group `split` on with its continuous values; None: as it is sampled."""
    return partial(student.sample, split=split)


def moves_of(source: str, teacher: Teacher, student: Student) -> dict[str, Move]:
    """The maps from noise that are measured of a source, by the figure's name; none of most sources.

    A student's samples are codes, unless its `split` says otherwise; what it computes before it takes the codes is a
    continuous map, and measured too.
    """
    if source == "ode_pairs":
        return {"path_length": flow_of(teacher)}
    if source == "student_1step":
        return {"path_length": step_of(student), "path_length_continuous": step_of(student, split=0)}
    return {}


def slerp(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """Noise [B, N, D] at t [B] of the great arcs from start to end [B, N, D]: as long as they are, at every t.

    A straight line would be shorter in its middle, where no noise is.
    """
    one, other = start.double().flatten(1), end.double().flatten(1)
    cosine = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
    angle, t = cosine.clamp(-1 + 1e-12, 1 - 1e-12).acos(), t.double()
    weights = torch.stack((((1 - t) * angle).sin(), (t * angle).sin())) / angle.sin()
    return (weights[0, :, None] * one + weights[1, :, None] * other).float().view(start.shape)


@torch.no_grad()
def path_lengths(move: Move, teacher: Teacher, distance: Distance, *, count: int, seed: int, batch_size: int) -> Tensor:
    """d(G(z(t)), G(z(t + STEP))) / STEP^2 of `count` paths, z(t) on the arc between two noises, t uniform in [0, 1].

    Path i has the class i modulo their number and the chance (seed, i). Several processes share the paths.

    Args:
        move: G, but for the image decoder, which is the teacher's.
        teacher: has one.
        distance: d.
        count, seed: of paths.
        batch_size: images at a time, two of a path.

    Returns:
        float64 [count], on the CPU; where processes share it, at the first one, elsewhere empty.
    """
    device, size = teacher.codebook.device, teacher.num_tokens * teacher.code_dim
    conditions, found = condition_index(teacher), []
    try:
        for number in processes.share(torch.arange(count, dtype=torch.int64).split(max(batch_size // 2, 1))):
            normal = noise(seed, number, (2 * size + 1,), device)
            start, end = normal[:, :-1].view(-1, 2, teacher.num_tokens, teacher.code_dim).unbind(1)
            t = torch.special.ndtr(normal[:, -1].double())
            eps = torch.cat((slerp(start, end, t), slerp(start, end, t + STEP)))
            condition = teacher.condition_of(conditions[number % len(conditions)].to(device).repeat(2))
            with fitting(len(eps), device, BATCH_OPTION), without_tf32():  # its rounding is longer than a step
                ends = (points.split(_AT_A_TIME) for points in move(condition, eps).chunk(2))
                images = (teacher.decode(torch.cat(pair), clamp=False).chunk(2) for pair in zip(*ends, strict=True))
                found.append(torch.cat([distance.between(*pair).double().cpu() / STEP**2 for pair in images]))
            processes.sign()
    finally:
        release_graphs(teacher)
    return torch.cat([*processes.collected(found), torch.empty(0, dtype=torch.float64)])


def path_figures(
    source: str, teacher: Teacher, student: Student, distance: Distance, **settings: int
) -> dict[str, float]:
    """Figures of a source's paths, if it has some: mean, its standard error, and the clipped mean as StyleGAN has it.

    A map to codes moves in jumps, which few of the short steps meet: its mean rests on these few, its error is large,
    and the clipped mean leaves most of them out.

    Args:
        source: name of the samples' source.
        teacher, student, distance: of `path_lengths`.
        settings: count, seed and batch_size, as `path_lengths` takes them.

    Returns:
        The same figures at every process.
    """
    figures: dict[str, float] = {}
    for name, move in moves_of(source, teacher, student).items():
        lengths = path_lengths(move, teacher, distance, **settings)
        figures |= processes.first_said(_figures(name, lengths) if len(lengths) else {})
    return figures


def _figures(name: str, lengths: Tensor) -> dict[str, float]:
    mean, error = lengths.mean(), lengths.std() / len(lengths) ** 0.5
    return {name: float(mean), f"{name}_error": float(error), f"{name}_clipped": float(clipped(lengths).mean())}


def clipped(lengths: Tensor) -> Tensor:
    """Lengths [count] without those below the first percentile or above the last."""
    low = torch.quantile(lengths, 0.01, interpolation="lower")
    high = torch.quantile(lengths, 0.99, interpolation="higher")
    return lengths[(low <= lengths) & (lengths <= high)]


@torch.no_grad()
def interpolate(
    teacher: Teacher,
    student: Student | None,
    *,
    count: int,
    frames: int,
    seed: int,
    classes: Sequence[int] | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Pictures of a student's one step along paths in noise, from one end to the other.

    Args:
        teacher: decodes them.
        student: makes them; None: the teacher does, by the flow.
        count: paths; path i has the class i modulo their number and the chance (seed, i), as in `path_lengths`.
        frames: pictures of each.
        seed: of the noise.
        classes: to cycle through; None: all.
        batch_size: pictures at a time.

    Returns:
        uint8 [count, frames, 3, H, W], on the CPU.

    Raises:
        ValueError, TypeError: a class is unknown, a number is below 1 (frames: 2), or the teacher makes no images.
    """
    for name, value, least in (("count", count, 1), ("frames", frames, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")
    device, size = teacher.codebook.device, teacher.num_tokens * teacher.code_dim
    conditions, number = condition_index(teacher, classes), torch.arange(count, dtype=torch.int64)
    ends = noise(seed, number, (2 * size + 1,), device)[:, :-1].view(-1, 2, teacher.num_tokens, teacher.code_dim)
    path = number.repeat_interleave(frames)
    t = torch.linspace(0, 1, frames, dtype=torch.float64, device=device).repeat(count)
    move = flow_of(teacher) if student is None else step_of(student)
    made = []
    for some in torch.arange(count * frames, dtype=torch.int64).split(batch_size):
        start, end = ends[path[some]].unbind(1)
        condition = teacher.condition_of(conditions[path[some] % len(conditions)].to(device))
        processes.sign()
        with fitting(len(some), device, BATCH_OPTION), processes.busy():
            made.append(pixels(teacher.decode(move(condition, slerp(start, end, t[some])), clamp=False)))
    return torch.cat(made).unflatten(0, (count, frames))

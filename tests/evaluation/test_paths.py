"""Paths in noise: lengths against closed forms, and pictures against samples."""

import math
from itertools import pairwise

import pytest
import torch
from launching import launch
from lpips_files import write_lpips
from measured_paths import SETTINGS, SQUARED, Plain, lengths, shared_lengths
from official import digits_like

from ddfast.config import EvaluationConfig
from ddfast.distill.lpips import LPIPS
from ddfast.evaluation import paths
from ddfast.evaluation.paths import (
    STEP,
    clipped,
    interpolate,
    path_distance,
    path_figures,
    path_lengths,
    slerp,
)
from ddfast.models.digits.files import DigitsFamily
from ddfast.models.flow_network import TransformerFlowNetwork
from ddfast.models.student import TransformerStudent
from ddfast.models.toy import ToyTeacher
from ddfast.ops import noise
from ddfast.pictures import pixels


def students():
    teacher = digits_like()
    torch.manual_seed(1)
    made = TransformerStudent.from_teacher(teacher), TransformerFlowNetwork.from_teacher(teacher)
    for student in made:
        for parameter in student.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return teacher, *(student.eval().requires_grad_(False) for student in made)


def test_an_arc_keeps_its_radius_and_its_pace():
    start, end = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    end = end * (start.flatten(1).norm(dim=1) / end.flatten(1).norm(dim=1))[:, None, None]
    arc = [slerp(start, end, torch.full((5,), step / 4)) for step in range(5)]
    assert torch.allclose(arc[0], start, atol=1e-6) and torch.allclose(arc[4], end, atol=1e-6)
    lengths = torch.stack([point.flatten(1).norm(dim=1) for point in arc])
    assert torch.allclose(lengths, lengths[:1].expand_as(lengths), rtol=1e-5)
    chords = torch.stack([(one - other).flatten(1).norm(dim=1) for one, other in pairwise(arc)])
    assert torch.allclose(chords, chords[:1].expand_as(chords), rtol=1e-5)


def test_lengths_of_a_linear_map():
    """The square of the arc's speed, times the map's factor."""
    teacher = Plain(num_tokens=6)
    found = path_lengths(lambda _, eps: 3 * eps, teacher, SQUARED, **SETTINGS)
    ends = noise(3, torch.arange(40), (25,)).double()
    one, other, t = ends[:, :12], ends[:, 12:24], torch.special.ndtr(ends[:, 24:])
    cosine = (one * other).sum(1, keepdim=True) / (one.norm(dim=1) * other.norm(dim=1))[:, None]
    angle = cosine.acos()
    speed = angle / angle.sin() * (-((1 - t) * angle).cos() * one + (t * angle).cos() * other)
    assert found.tolist() == pytest.approx((9 * speed.square().sum(1)).tolist(), rel=5e-3)  # float32 noise, and STEP


def test_lengths_of_steps():
    """A map to codes rests on most of the short steps, and jumps on the others."""
    teacher = Plain(num_tokens=6)
    found = path_lengths(paths.flow_of(teacher), teacher, SQUARED, count=4000, seed=0, batch_size=4000)
    jumps = found[found > 0]
    assert 0 < len(jumps) < 40
    assert jumps.min() * STEP**2 > 0.1  # from one code to its neighbour
    assert float(clipped(found).mean()) == 0


def test_lengths_depend_on_neither_batch_size_nor_processes():
    whole, parts = lengths(), lengths(batch_size=7)
    assert torch.allclose(whole, parts, rtol=1e-6)
    first, other = launch(2, shared_lengths)
    assert torch.equal(first, parts) and len(other) == 0


def test_clipping():
    """As NumPy's percentiles, lower and higher, which the official code takes."""
    values = torch.arange(200, dtype=torch.float64)[torch.randperm(200)]
    assert sorted(clipped(values).tolist()) == list(range(1, 199))


def test_the_distance_of_a_family(monkeypatch):
    teacher = digits_like()
    network = type("Network", (), {"features": lambda self, images: 2 * images.flatten(1)})()
    monkeypatch.setattr(DigitsFamily, "feature_network", lambda *_: network)
    distance = path_distance(EvaluationConfig(), teacher)
    assert distance is not None and distance.name == "features"
    one, other = torch.rand(2, 3, 1, 16, 16) - 0.5
    assert torch.allclose(distance.between(one, other), (one - other).square().sum((1, 2, 3)))  # 2 of [0, 1]
    assert path_distance(EvaluationConfig(paths=0), teacher) is None
    assert path_distance(EvaluationConfig(), ToyTeacher()) is None


def test_lpips_where_its_files_are(tmp_path):
    vgg, linear = write_lpips(tmp_path)
    settings = EvaluationConfig(lpips_vgg=str(vgg), lpips_linear=str(linear))
    distance = path_distance(settings, digits_like())
    assert distance is not None and distance.name == "lpips"
    one, other = torch.rand(2, 2, 1, 16, 16) - 0.5
    assert torch.equal(distance.between(one, other), LPIPS.load(vgg, linear)(one, other))
    with pytest.raises(ValueError, match="lpips_vgg: got a file, but ToyTeacher has no image tokenizer"):
        path_distance(settings, ToyTeacher())
    with pytest.raises(ValueError, match="lpips_linear: got ''"):
        EvaluationConfig(lpips_vgg=str(vgg))


def test_figures_of_sources():
    teacher, *both = students()
    for student in both:
        figures = path_figures("student_1step", teacher, student, SQUARED, **SETTINGS)
        names = ("path_length", "path_length_continuous")
        assert set(figures) == {name + ending for name in names for ending in ("", "_error", "_clipped")}
        continuous = path_lengths(paths.step_of(student, split=0), teacher, SQUARED, **SETTINGS)
        assert figures["path_length_continuous"] == pytest.approx(float(continuous.mean()))
        error = float(continuous.std()) / math.sqrt(40)
        assert figures["path_length_continuous_error"] == pytest.approx(error)
        assert 0 < figures["path_length_continuous"] < math.inf
    assert set(path_figures("ode_pairs", teacher, student, SQUARED, **SETTINGS)) == {
        "path_length", "path_length_error", "path_length_clipped",
    }  # fmt: skip
    assert path_figures("teacher", teacher, student, SQUARED, **SETTINGS) == {}


def test_pictures_of_a_path():
    teacher, student, _ = students()
    made = interpolate(teacher, student, count=3, frames=4, seed=2, classes=[5, 7], batch_size=5)
    assert made.shape == (3, 4, 3, 16, 16) and made.dtype == torch.uint8
    size = teacher.num_tokens * teacher.code_dim
    ends = noise(2, torch.arange(3), (2 * size + 1,))[:, :-1].view(3, 2, teacher.num_tokens, teacher.code_dim)
    label = torch.tensor([5, 7, 5])
    for frame, end in ((0, 0), (3, 1)):
        images = pixels(teacher.decode(student.sample(label, ends[:, end]), clamp=False))
        assert (made[:, frame].int() - images.int()).abs().max() <= 1
    assert len(made.flatten(2).flatten(0, 1).unique(dim=0)) == 12
    of_teacher = interpolate(teacher, None, count=2, frames=2, seed=2)
    codes = teacher.generate(torch.tensor([0, 1]), sampler="flow", noise=ends[:2, 0])
    assert (of_teacher[:, 0].int() - pixels(teacher.decode(codes, clamp=False)).int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"count": 0}, "count: got 0"),
        ({"frames": 1}, "frames: got 1, expected at least 2"),
        ({"classes": [99]}, "classes"),
    ],
)
def test_errors(arguments, words):
    teacher, student, _ = students()
    with pytest.raises(ValueError, match=words):
        interpolate(teacher, student, **{"count": 2, "frames": 2, "seed": 0, **arguments})

"""PyTorch's default dtype changes nothing of a training, an evaluation, or what is trained on first use."""

import pytest
import torch
from official import llamagen_teacher_like

from ddfast.config import (
    AdaptConfig,
    DD1Config,
    DigitsTeacherConfig,
    DigitsTokenizerConfig,
    MatchConfig,
    TuneConfig,
)
from ddfast.distill.dd1 import DD1
from ddfast.distill.dd2 import Adaptation, Matching, Tuning
from ddfast.distill.lpips import LPIPS
from ddfast.distill.method import Method, Roles
from ddfast.distill.trainer import from_noise, optimise
from ddfast.evaluation.quality import pair_table_distance
from ddfast.evaluation.sources import draw_marginals, marginal_tables
from ddfast.frechet import Gaussian, frechet_distance
from ddfast.models import digits
from ddfast.models.digits import classifier
from ddfast.models.flow_network import TransformerFlowNetwork
from ddfast.models.llamagen.network import LlamaGenFlowNetwork
from ddfast.models.student import TransformerStudent
from ddfast.models.toy import ToyTeacher

STEPS = {"batch_size": 4, "warmup": 2, "log_every": 2, "checkpoint_every": 100}


def flow_network(seed: int) -> TransformerFlowNetwork:
    torch.manual_seed(seed)
    return TransformerFlowNetwork(ToyTeacher(), width=16, depth=1, heads=2, head_width=16, head_depth=1)


def trained(method: Method, config: object, out) -> dict[str, torch.Tensor]:
    """Every parameter after a few updates, and the averages."""
    teacher = method.roles.teacher
    draw = from_noise(teacher, decoding=teacher.defaults)
    average = optimise(method, config, draw, out, stage="s", seed=0, identity="i", ema_decay=0.9, watch_every=2)
    found = {f"average.{name}": value for name, value in average.average.items()}
    for role, network in method.networks.items():
        found |= {f"{role}.{name}": value.detach() for name, value in network.named_parameters()}
    return found


def dd1(out):
    torch.manual_seed(0)
    student, config = (
        TransformerStudent(ToyTeacher(), width=16, depth=1, heads=2),
        DD1Config(point=2, iterations=3, **STEPS),
    )
    return trained(DD1(Roles(student=student, teacher=student.teacher), config), config, out)


def adaptation(out):
    teacher = llamagen_teacher_like()
    torch.manual_seed(0)
    network = LlamaGenFlowNetwork.from_teacher(teacher, head_width=16, head_depth=1)
    config = AdaptConfig(iterations=4, fit_iterations=2, optimizer="muon", **STEPS)
    return trained(Adaptation(Roles(student=network, teacher=teacher), config), config, out)


def tuning(out):
    student, config = flow_network(0), TuneConfig(iterations=4, head_iterations=2, loss="gts", draws=2, **STEPS)
    return trained(Tuning(Roles(student=student, teacher=student.teacher), config), config, out)


def matching(out, **settings):
    student, guidance = flow_network(0), flow_network(1)
    counts = {"start_iterations": 2, "guidance_first": 1, "iterations": 2, "guidance_updates": 1}
    config = MatchConfig(**STEPS, **counts, **settings)
    return trained(Matching(Roles(student=student, teacher=student.teacher, guidance=guidance), config), config, out)


def digits_of_nothing(out):
    """The tokenizer, the teacher and the classifier that are trained on first use."""
    tokenizer = digits.train_tokenizer(DigitsTokenizerConfig(iterations=6, warmup=3, batch_size=8))
    teacher = digits.train_teacher(
        tokenizer, DigitsTeacherConfig(width=32, depth=1, heads=2, iterations=3, batch_size=8, training_images=64)
    )
    judge = classifier.train_classifier()
    images, _ = digits.digit_batch("test", 64, 3)
    features = judge.features(images)
    reference = judge.features(digits.digit_batch("test", 64, 4)[0])
    found = {f"digits.{name}": value for name, value in teacher.state_dict().items()}
    return found | {
        "features": features,
        "frechet": torch.tensor(frechet_distance(Gaussian.of(features), Gaussian.of(reference)), dtype=torch.float64),
    }


def marginals(out):
    teacher, generator = ToyTeacher(), torch.Generator().manual_seed(0)
    tables = marginal_tables(teacher, generator, samples_per_class=50)
    codes = draw_marginals(tables, torch.zeros(30, dtype=torch.int64), generator)
    distances = [pair_table_distance(codes, teacher.all_sequences(), 8), teacher.total_variation(codes)]
    return {"tables": tables, "codes": codes, "distances": torch.tensor(distances, dtype=torch.float64)}


def perceptual(out):
    torch.manual_seed(0)
    distance, images = LPIPS(), torch.rand(2, 2, 3, 32, 32, dtype=torch.float32)
    return {"lpips": distance(*images).detach(), **{f"lpips.{n}": b for n, b in distance.named_buffers()}}


WORK = {
    "dd1": dd1,
    "adaptation": adaptation,
    "tuning": tuning,
    "matching": matching,
    "matching by velocity": lambda out: matching(out, form="sid", fake_score="velocity"),
    "digits": digits_of_nothing,
    "marginals": marginals,
    "lpips": perceptual,
}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(classifier, "_ITERATIONS", 3)


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def default_dtype(request):
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("work", sorted(WORK))
def test_the_default_dtype_does_not_matter(tmp_path, work, default_dtype):
    expected = WORK[work](tmp_path / "expected")
    torch.set_default_dtype(default_dtype)
    found = WORK[work](tmp_path / "found")
    torch.set_default_dtype(torch.float32)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name

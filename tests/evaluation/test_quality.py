import functools
import time

import pytest
import torch

from ddfast.evaluation import sources, speed
from ddfast.evaluation.plain_decoding import PlainDecoder
from ddfast.evaluation.quality import pair_table_distance, pairs_counted
from ddfast.evaluation.sources import MEASURED, SOURCES, draw_marginals, marginal_tables, sample, sources_for, stream
from ddfast.evaluation.speed import measure_speed
from ddfast.frechet import Gaussian, frechet_distance
from ddfast.models.digits.data import digit_batch
from ddfast.models.flow_network import TransformerFlowNetwork
from ddfast.models.loading import untrained_teacher
from ddfast.models.student import TransformerStudent
from ddfast.models.toy import ToyTeacher
from ddfast.recipes import get_recipe
from ddfast.sampling import sample_student


def test_pair_table_distance():
    same = torch.tensor([[0, 0], [1, 1]])
    crossed = torch.tensor([[0, 1], [1, 0]])
    assert pair_table_distance(same, same, 2) == 0
    assert pair_table_distance(same, crossed, 2) == 1
    assert pair_table_distance(same, torch.cat((same, crossed)), 2) == 0.5


@pytest.mark.parametrize("recipe", ["digits", "digits-llamagen", "digits-var"])
def test_pairs_are_counted_where_that_takes_minutes(recipe):
    """Their number grows as the square of the tokens': 2.5 million pairs of VAR's 2,240 at 512 pixels."""
    teacher = untrained_teacher(get_recipe(recipe))
    assert pairs_counted(teacher.num_tokens, teacher.num_codes)
    assert pairs_counted(256, 128)
    assert not pairs_counted(2240, 64)
    assert not pairs_counted(16, 4096)


def test_marginals_are_left_out_where_they_would_take_hours():
    """A table takes thousands of the teacher's samples per class; ImageNet has a thousand."""
    toy = ToyTeacher()
    assert "independent_marginals" in [source.name for source in sources_for(toy)]
    toy.num_classes = 10_000
    assert "independent_marginals" not in [source.name for source in sources_for(toy)]


def test_marginals_are_right_and_independent():
    toy = ToyTeacher()
    generator = torch.Generator().manual_seed(0)
    tables = marginal_tables(toy, generator, samples_per_class=100_000)
    joint, sequences = toy.joint(), toy.all_sequences()
    for token in range(4):
        exact = torch.zeros(8, dtype=torch.float64).index_add_(0, sequences[:, token], joint)
        assert (tables[0, token].double() - exact).abs().max() < 0.01
    codes = draw_marginals(tables, torch.zeros(100_000, dtype=torch.int64), generator)
    pairs = torch.bincount(codes[:, 0] * 8 + codes[:, 3], minlength=64).view(8, 8) / len(codes)
    assert (pairs - tables[0, 0][:, None] * tables[0, 3][None]).abs().max() < 0.01


def networks():
    config = get_recipe("digits")
    config.teacher.width, config.teacher.depth = 32, 1
    teacher = untrained_teacher(config)
    student = TransformerStudent.from_teacher(teacher).eval()
    student.point = 5
    return teacher, student


@pytest.mark.parametrize("source", MEASURED)
def test_every_source(source, monkeypatch):
    # How good the tables are is another test's business.
    few = functools.partial(marginal_tables, samples_per_class=100)
    monkeypatch.setattr(sources, "marginal_tables", lambda teacher, generator, **_: few(teacher, generator))
    teacher, student = networks()
    if source == "ar_diffusion":  # of another kind of network
        with pytest.raises(ValueError, match="student: got none of DD2's networks"):
            sample(source, teacher, student, count=23, seed=1)
        student = TransformerFlowNetwork.from_teacher(teacher)
    made = sample(source, teacher, student, count=23, seed=1)
    assert made.codes.shape == (23, 16)
    assert torch.equal(made.embeddings, teacher.codebook[made.codes])
    assert made.condition.tolist() == [index % 10 for index in range(23)]
    again = sample(source, teacher, student, count=23, seed=1)
    assert torch.equal(made.codes, again.codes)
    assert not torch.equal(made.codes, sample(source, teacher, student, count=23, seed=2).codes)


def test_skip_last_keeps_the_teachers_first_tokens():
    teacher, _ = networks()
    skipped, whole = (sample(name, teacher, count=50, seed=1).codes for name in ("skip_last", "teacher"))
    assert torch.equal(skipped[:, :12], whole[:, :12])
    assert not torch.equal(skipped[:, 12:], whole[:, 12:])


def test_student_samples_do_not_depend_on_the_batch_size():
    teacher, student = networks()
    parts, whole = (
        sample_student(teacher, student, count=9, seed=1, steps=2, batch_size=size).codes for size in (4, 9)
    )
    assert (parts != whole).float().mean() < 0.02  # matrix products may round differently


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"source": "magic"}, "source: got 'magic'"),
        ({"count": 0}, "count: got 0"),
        ({"classes": (3, 10)}, r"classes: got \[3, 10\]"),
        ({"source": "student_1step"}, "student: got None"),
    ],
)
def test_errors(arguments, words):
    settings = {"source": "teacher", "count": 2, "seed": 0, **arguments}
    with pytest.raises(ValueError, match=words):
        sample(settings.pop("source"), networks()[0], **settings)


def test_speed_has_every_source_and_batch_size():
    teacher, student = networks()
    seconds = measure_speed(teacher, student, batch_sizes=(1, 8), rounds=3)
    assert set(seconds) == {"image_decoder", *(source.name for source in SOURCES.values() if source.timed)}
    assert all(value > 0 for row in seconds.values() for value in row.values())
    assert seconds["teacher"][8] < seconds["teacher"][1]


def test_speed_measures_a_slow_source_once(monkeypatch):
    teacher, student = networks()
    calls = []
    monkeypatch.setattr(PlainDecoder, "generate", lambda *_: calls.append(time.sleep(0.02)))
    monkeypatch.setattr(speed, "_ENOUGH_SECONDS", 0.01)
    seconds = measure_speed(teacher, student, batch_sizes=(2,), rounds=3)
    assert len(calls) == 1
    assert 0.01 <= seconds["teacher_plain"][2] < 1


@pytest.mark.full
def test_evaluator_tells_real_from_noise(tmp_path, monkeypatch):
    from ddfast.evaluation import Evaluator
    from ddfast.models.digits import classifier

    monkeypatch.setenv("DDFAST_CACHE", str(tmp_path))
    config = get_recipe("digits")
    config.evaluation.samples = 500
    teacher, _ = networks()
    evaluator = Evaluator(config, teacher)
    images, labels = digit_batch("test", 2000, seed=9)
    features = evaluator.classifier.features(images)
    assert (evaluator.classifier.logits(features).argmax(-1) == labels).double().mean() > 0.85
    assert frechet_distance(Gaussian.of(features), evaluator.reference.gaussians["frechet"]) < 20
    measured = evaluator.measure(sample("teacher", teacher, count=500, seed=5))
    figures = {"frechet", "frechet_error", "precision", "recall", "class_accuracy", "teacher_nll", "pair_tv", "count"}
    assert set(measured) == figures
    assert measured["frechet"] > 50  # an untrained teacher
    assert 0 < measured["frechet_error"] < measured["frechet"] / 5
    assert measured["precision"] < 0.1
    assert 3 < measured["teacher_nll"] < 5  # near log 64
    assert len(list(tmp_path.glob("digits-classifier-*"))) == 1
    assert classifier.load_or_train_classifier(lambda *_: pytest.fail("trained again")) is not None


def test_measuring_batches_is_measuring_all():
    """Of each batch, what the figures need is kept; the whole set need never be there."""
    from ddfast.evaluation import Evaluator

    config, teacher = get_recipe("digits"), ToyTeacher()
    config.evaluation.samples = 300
    evaluator = Evaluator(config, teacher)
    settings = {"count": 300, "seed": 4}
    whole = evaluator.measure(sample("teacher", teacher, **settings))
    assert set(whole) == {"teacher_nll", "pair_tv", "count"}
    assert evaluator.measure(stream("teacher", teacher, batch_size=7, **settings)) == pytest.approx(whole)

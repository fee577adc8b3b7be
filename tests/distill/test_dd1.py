import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from checkpointed import last_step
from small import LABELS, build

from ddfast.config import DD1Config, TrainConfig, as_then, config_hash, plain
from ddfast.distill import dd1
from ddfast.distill.batch import Batch, Part
from ddfast.distill.dd1 import DD1
from ddfast.distill.losses import embedding_distance, token_cross_entropy
from ddfast.distill.method import ExponentialMovingAverage, Roles
from ddfast.distill.stages import distill, untrained_student
from ddfast.distill.tracking import METRICS
from ddfast.errors import DDFastError
from ddfast.models.autoregressive import SamplingDefaults
from ddfast.models.student import TransformerStudent
from ddfast.models.toy import ToyTeacher
from ddfast.schedule import warmup_cosine
from ddfast.trajectories.generate import generate_trajectories, store_settings
from ddfast.trajectories.store import Trajectories, TrajectoryStore

TOY = TrainConfig(dd1=DD1Config(point=2, iterations=40, batch_size=32, warmup=5, log_every=4, checkpoint_every=5))


def pairs(path) -> Trajectories:
    teacher = ToyTeacher()
    store = TrajectoryStore.open_or_create(path, store_settings(teacher, TOY.trajectories, 0))
    generate_trajectories(teacher, store, 1000)
    return store.load()


def toy_student() -> TransformerStudent:
    torch.manual_seed(0)
    return TransformerStudent(ToyTeacher(), width=16, depth=1, heads=2)


def test_losses_look_at_open_tokens_only():
    logits, codes = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    open_tokens = torch.tensor([[False, True, True], [True, False, True]])
    by_hand = -logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0][open_tokens].mean()
    assert torch.allclose(token_cross_entropy(logits, codes, open_tokens), by_hand)
    embeddings, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    by_hand = (embeddings - target)[open_tokens].abs().mean()
    assert torch.allclose(embedding_distance(embeddings, target, open_tokens), by_hand)


@pytest.mark.parametrize("later", [(), (4, 6)])
def test_a_step_sees_data_before_its_point_and_noise_after_it(later):
    teacher, student = build((1,) * 7, trained=True)
    labels = LABELS.repeat(8)
    batch = Batch(noise=torch.randn(32, 7, 3), codes=torch.randint(11, (32, 7)), condition=labels)
    seen = {}
    original = student.features
    student.features = lambda condition, x, t: (seen.update(x=x, t=t), original(condition, x, t))[1]
    config = DD1Config(point=3, later_points=later, point_probability=0.5)
    method = DD1(Roles(student=student, teacher=teacher), config)
    loss, logged = method.step("student", batch, Part.whole(len(batch.noise), torch.Generator().manual_seed(4)))
    assert sorted(seen["t"].unique().tolist()) == [0, 3, *later]
    for row, point in enumerate(seen["t"].tolist()):
        assert torch.equal(seen["x"][row, :point], teacher.codebook[batch.codes[row, :point]])
        assert torch.equal(seen["x"][row, point:], batch.noise[row, point:])
    assert abs(loss.item() - logged["cross_entropy"] - logged["embedding_distance"]) < 1e-5


def own_method(teacher, student, **settings) -> DD1:
    config = DD1Config(point=3, own_share=1.0, lookahead_weight=0.5, **settings)
    return DD1(Roles(student=student, teacher=teacher), config)


def test_targets_are_what_the_teachers_flow_makes_of_the_noise_after_the_students_own_codes(monkeypatch):
    teacher, student = build((1,) * 7, trained=True)
    teacher.defaults = SamplingDefaults(cfg_scale=1.7, temperature=1.2)
    method = own_method(teacher, student, point_probability=0.5)
    noise = torch.randn(4, 7, 3)
    seen = {}
    for name in ("token_cross_entropy", "embedding_distance", "next_token_divergence"):

        def loss(*arguments, name=name):
            seen[name] = arguments
            return arguments[0].sum() * 0

        monkeypatch.setattr(dd1, name, loss)
    part = Part.whole(4, torch.Generator().manual_seed(4))
    method.step("own", Batch(noise=noise, codes=None, condition=LABELS), part)
    logits, codes, open_tokens = seen["token_cross_entropy"]
    points = (~open_tokens).sum(1)
    assert sorted(points.unique().tolist()) == [0, 3]
    first = student.predict(LABELS, noise, 0)[0].argmax(-1)
    made = torch.where(open_tokens, logits.argmax(-1), first)
    x = torch.where(open_tokens[..., None], noise, teacher.codebook[first])
    assert torch.allclose(student.predict(LABELS, x, points)[0], logits, atol=1e-5)
    for place in range(7):  # each by a decoding of its own, after the student's codes
        prefix = made[:, :place]
        own = teacher.generate(LABELS, sampler="flow", noise=noise, prefix=prefix, stop=place + 1)
        assert torch.equal(codes[:, place], own[:, place])
    assert torch.equal(seen["embedding_distance"][1], teacher.codebook[codes])
    ahead, log_probs = seen["next_token_divergence"]
    assert torch.equal(log_probs, teacher.log_probs(LABELS, made)[:, 1:])
    assert ahead.shape == log_probs.shape
    hidden, _ = student.features(LABELS, x, points)
    assert torch.allclose(ahead, student.head(hidden[:, :-1]), atol=1e-5)  # the layer begins as the identity


def test_own_targets_leave_nothing_behind_and_resume(tmp_path):
    config = dataclasses.replace(TOY, dd1=dataclasses.replace(TOY.dd1, own_share=1.0, lookahead_weight=1.0))
    whole, live = distill(config, ToyTeacher(), None, tmp_path / "whole", student=toy_student())
    assert set(whole.state_dict()) == set(toy_student().state_dict())
    assert set(live) == set(whole.state_dict())
    lines = [json.loads(line) for line in (tmp_path / "whole" / METRICS).read_text().splitlines()]
    assert lines[-1]["lookahead"] < lines[0]["lookahead"]

    def stop(done, total, text):
        if done == 17:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        distill(config, ToyTeacher(), None, tmp_path / "parts", student=toy_student(), progress=stop)
    resumed, _ = distill(config, ToyTeacher(), None, tmp_path / "parts", student=toy_student())
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_own_targets_do_not_depend_on_the_micro_batch():
    teacher, student = build((1,) * 7, trained=True)
    method, noise = own_method(teacher, student), torch.randn(6, 7, 3)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])

    def contribution(first, last):
        part = Part(size=6, first=first, last=last, generator=torch.Generator().manual_seed(4))
        return method.step("own", Batch(noise=noise[first:last], codes=None, condition=labels[first:last]), part)[0]

    assert (contribution(0, 2) + contribution(2, 6)).item() == pytest.approx(contribution(0, 6).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("groups", "settings", "words"),
    [
        ((1, 3), {"own_share": 0.5}, "is for teachers of one token per group"),
        ((1,) * 4, {}, "0 or more, and 0 with own_share 0"),
        ((1,) * 4, {"own_share": 1.5}, r"own_share: got 1.5, expected in \[0, 1\]"),
    ],
)
def test_a_look_ahead_that_cannot_be_is_refused(groups, settings, words):
    teacher, student = build(groups)
    with pytest.raises(ValueError, match=words):
        DD1(Roles(student=student, teacher=teacher), DD1Config(point=1, lookahead_weight=1.0, **settings))


def test_points_are_as_likely_as_each_other():
    teacher, student = build((1,) * 7)
    method = DD1(Roles(student=student, teacher=teacher), DD1Config(point=2, later_points=(3, 5)))
    generator = torch.Generator().manual_seed(0)
    drawn = method._points(torch.arange(9000) % 3 > 0, generator)
    assert torch.equal(drawn == 0, torch.arange(9000) % 3 == 0)
    shares = torch.bincount(drawn, minlength=7)[[2, 3, 5]] / 6000
    assert (shares - 1 / 3).abs().max() < 5 * (2 / 9 / 6000) ** 0.5


def test_a_student_of_several_points_takes_as_many_steps_and_its_header_says_so(tmp_path):
    config = dataclasses.replace(TOY, dd1=dataclasses.replace(TOY.dd1, point=1, later_points=(2, 3)))
    made, _ = distill(config, ToyTeacher(), pairs(tmp_path / "pairs"), tmp_path / "run", student=toy_student())
    again = toy_student()
    again.read_header(made.header())
    again.load_state_dict(made.state_dict())
    student = again.eval()
    assert (student.point, student.later_points) == (1, (2, 3))
    assert [student.settings(steps)["steps"] for steps in (1, 2, 3, 4)] == [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)]
    with pytest.raises(ValueError, match="steps: got 5, expected 1 to 4 of this DD1 student"):
        student.settings(5)
    condition, noise = torch.zeros(3, dtype=torch.int64), torch.randn(3, 4, 2)
    by_hand = noise
    for point in range(4):
        by_hand = student.complete(condition, by_hand, noise, point, None)
    assert torch.equal(student.sample(condition, noise, **student.settings(4)), by_hand)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"point": 3, "later_points": (3,)},
            r"later_points: got \(3,\), expected rising trajectory points after point=3",
        ),
        ({"point": 3, "later_points": (5, 4)}, r"later_points: got \(5, 4\), expected rising"),
        ({"point": 3, "later_points": (5, 7)}, r"later_points: got \(5, 7\), expected .* in 4..6"),
    ],
)
def test_later_points_that_cannot_be_are_refused(settings, words):
    teacher, student = build((1,) * 7)
    with pytest.raises(ValueError, match=words):
        DD1(Roles(student=student, teacher=teacher), DD1Config(**settings))


def test_settings_of_before_have_no_later_points():
    before, now = plain(DD1Config()), DD1Config()
    del before["later_points"]
    assert as_then({"dd1": before})["dd1"] == plain(now)
    assert config_hash(now) != config_hash(dataclasses.replace(now, later_points=(7,)))


def test_a_point_outside_the_trajectory_is_refused():
    teacher, student = build((1,) * 7)
    with pytest.raises(ValueError, match=r"point: got 7, expected a trajectory point in 1\.\.6"):
        DD1(Roles(student=student, teacher=teacher), DD1Config(point=7))


def test_moving_average():
    network = torch.nn.Linear(1, 1, bias=False)
    average = ExponentialMovingAverage(network, 0.9)
    value = expected = network.weight.item()
    for step in range(60):
        value += 1.0
        with torch.no_grad():
            network.weight.fill_(value)
        average.update(network, step)
        rate = min(0.9, (step + 1) / (step + 10))
        expected = rate * expected + (1 - rate) * value
    average.copy_to(network)
    assert abs(network.weight.item() - expected) < 1e-3


def test_learning_rate_warms_up_and_decays_to_zero():
    rates = [warmup_cosine(step, total=110, warmup=10) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0.0)
    assert warmup_cosine(0, total=1, warmup=0) == 1.0


def test_training_lowers_the_loss_and_logs(tmp_path):
    config = dataclasses.replace(TOY, dd1=dataclasses.replace(TOY.dd1, iterations=300, learning_rate=3e-3))
    distill(config, ToyTeacher(), pairs(tmp_path / "pairs"), tmp_path, student=toy_student())
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(4, 301, 4))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert {"cross_entropy", "embedding_distance", "gradient_norm", "learning_rate"} <= set(lines[0])


def test_interrupted_and_resumed_is_the_same_run(tmp_path):
    trajectories = pairs(tmp_path / "pairs")
    whole, live = distill(TOY, ToyTeacher(), trajectories, tmp_path / "whole", student=toy_student())

    def stop(done, total, text):
        if done == 17:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        distill(TOY, ToyTeacher(), trajectories, tmp_path / "parts", student=toy_student(), progress=stop)
    assert last_step(tmp_path / "parts") == 17
    resumed, resumed_live = distill(TOY, ToyTeacher(), trajectories, tmp_path / "parts", student=toy_student())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
        assert torch.equal(live[name], resumed_live[name])
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / run / METRICS).read_text().splitlines()]
        for run in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    trajectories = pairs(tmp_path / "pairs")
    distill(TOY, ToyTeacher(), trajectories, tmp_path, student=toy_student())
    other = dataclasses.replace(TOY, seed=1)
    with pytest.raises(DDFastError, match="belongs to a run with other settings"):
        distill(other, ToyTeacher(), trajectories, tmp_path, student=toy_student())


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    trajectories = pairs(tmp_path / "pairs")
    student = toy_student()
    with torch.no_grad():
        student.head.bias[0] = torch.inf
    before = student.input.weight.clone()
    with pytest.raises(DDFastError, match=r"the loss became (nan|inf) at step 0"):
        distill(TOY, ToyTeacher(), trajectories, tmp_path, student=student)
    assert torch.equal(student.input.weight, before)


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from test_dd1 import TOY, ToyTeacher, distill, pairs, toy_student
out = Path(sys.argv[1])
student, _ = distill(TOY, ToyTeacher(), pairs(out / "pairs"), out, student=toy_student())
torch.save(student.state_dict(), out / "student.pt")
"""


@pytest.mark.full
def test_killed_at_any_moment_it_ends_with_the_same_weights(tmp_path):
    call = [sys.executable, "-c", SCRIPT.format(paths=[os.path.dirname(__file__), *sys.path])]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = distill(TOY, ToyTeacher(), pairs(tmp_path / "pairs"), tmp_path, student=toy_student())[0].state_dict()
    finally:
        torch.set_num_threads(threads)
    target = tmp_path / "killed"
    for step in (5, 20):
        process = subprocess.Popen([*call, str(target)])
        while process.poll() is None:
            time.sleep(0.001)
            if last_step(target) >= step:
                break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (target / "student.pt").exists()
    subprocess.run([*call, str(target)], check=True)
    ours = torch.load(target / "student.pt", weights_only=True)
    assert all(torch.equal(ours[name], value) for name, value in whole.items())


@pytest.mark.parametrize(("groups", "point"), [(2, 1), (4, 2), (7, 2), (16, 5)])
def test_where_nobody_says_it_the_second_step_starts_behind_the_first_quarter(groups, point):
    teacher, student = build((1,) * groups)
    assert DD1(Roles(student=student, teacher=teacher), DD1Config()).points == (point,)
    made = untrained_student(TrainConfig(), teacher)
    assert (made.point, made.later_points) == (point, ())

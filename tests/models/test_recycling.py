"""Students whose network runs again within a pass and reads the codes that it made before."""

import dataclasses

import pytest
import torch
from official import llamagen_teacher_like, randomised, var_teacher_like
from small import build

from ddfast.config import DD1Config, MatchConfig, as_then, config_hash, plain
from ddfast.distill.batch import Batch, Part
from ddfast.distill.dd1 import DD1
from ddfast.distill.dd2 import Matching
from ddfast.distill.method import Roles
from ddfast.models import flow_network
from ddfast.models import student as student_module
from ddfast.models.loading import load_student, save_student, start_student, student_class
from ddfast.models.student import Student
from ddfast.ops import nearest_code
from ddfast.recipes import get_recipe

TEACHERS = {
    "one by one": lambda: build((1,) * 7, trained=True)[0],
    "groups": lambda: build((1, 3, 2), trained=True)[0],
    "llamagen": llamagen_teacher_like,
    "llamagen, text": lambda: llamagen_teacher_like(model_type="t2i", cls_token_num=6),
    "var": var_teacher_like,
}
SIZES = {"dd1": {}, "dd2": {"head_width": 16, "head_depth": 2}}

cases = pytest.mark.parametrize("name", TEACHERS)
methods = pytest.mark.parametrize("method", SIZES)


def student_of(teacher, method: str, recycles: int) -> Student:
    torch.manual_seed(1)
    return student_class(teacher, method)(teacher, recycles=recycles, **SIZES[method])


def condition_of(teacher, batch: int):
    if teacher.num_classes:
        return torch.arange(batch) % teacher.num_classes
    features = torch.randn(batch, teacher.sizes.cls_token_num, teacher.sizes.caption_dim)
    return features, torch.ones(features.shape[:2], dtype=torch.int64)


def noise_of(teacher, batch: int) -> torch.Tensor:
    return torch.randn(batch, teacher.num_tokens, teacher.code_dim, generator=torch.Generator().manual_seed(2))


@methods
@cases
def test_runs_read_what_was_made_before(name, method):
    teacher = TEACHERS[name]()
    student = randomised(student_of(teacher, method, 2))
    condition, noise = condition_of(teacher, 3), noise_of(teacher, 3)
    if method == "dd1":
        runs = [(hidden, context) for hidden, context, _ in student.runs(condition, noise, 0)]
    else:
        runs = student.runs(condition, noise)
    assert len(runs) == 3
    last = student.predict(condition, noise, 0)[1]
    if method == "dd1":
        codes = [student.code_logits(*run).argmax(-1) for run in runs]
        own = student.features(condition, torch.cat((noise, teacher.codebook[codes[1]]), dim=-1), 0)
        assert torch.equal(own[0], runs[2][0]) and torch.equal(last, student.continuous(*runs[2]))
        made = student.sample(condition, noise)
        assert torch.equal(made, teacher.codebook[codes[2]]) and not torch.equal(codes[0], codes[1])
    else:
        codes = [nearest_code(x, teacher.codebook) for x, _ in runs]
        own = student.features(condition, torch.cat((noise, teacher.codebook[codes[1]]), dim=-1))
        assert torch.equal(own, runs[2][1]) and torch.equal(last, runs[2][0])
        assert torch.equal(student.sample(condition, noise), teacher.codebook[codes[2]])
    changed = [(now - then).abs().max() > 1e-3 for now, then in zip(runs[1], runs[0], strict=True) if now.ndim == 3]
    assert any(changed)


@methods
@cases
def test_a_token_still_sees_no_later_group(name, method):
    teacher = TEACHERS[name]()
    student = randomised(student_of(teacher, method, 2))
    condition, noise, starts = condition_of(teacher, 2), noise_of(teacher, 2), teacher.group_starts()
    before = student.predict(condition, noise, 0)[1]
    for group in range(1, len(teacher.groups)):
        later = noise.clone()
        later[:, starts[group] :] += 1
        after = student.predict(condition, later, 0)[1]
        assert torch.allclose(after[:, : starts[group]], before[:, : starts[group]], atol=1e-5)
        assert not torch.allclose(after[:, starts[group] :], before[:, starts[group] :], atol=1e-5)


@methods
@cases
def test_it_starts_as_one_that_does_not_recycle(name, method, tmp_path):
    """With the new layer at 0; and a file says how often it recycles, one of before does not."""
    teacher = TEACHERS[name]()
    plain = randomised(student_of(teacher, method, 0))
    student = student_of(teacher, method, 2).eval().requires_grad_(False)
    missing = student.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing.missing_keys) == {"recycled.weight", "recycled.bias"} and not missing.unexpected_keys
    condition, noise = condition_of(teacher, 3), noise_of(teacher, 3)
    for ours, theirs in zip(student.predict(condition, noise, 0), plain.predict(condition, noise, 0), strict=True):
        assert (ours is theirs is None) or torch.equal(ours, theirs)
    assert "recycles" not in plain.config
    student.recycled.weight.normal_()
    save_student(tmp_path / "student.safetensors", student, {})
    again = load_student(tmp_path, teacher)
    assert again.recycles == 2
    assert torch.equal(again.sample(condition, noise), student.sample(condition, noise))


def test_a_point_of_two_steps_is_kept_between_runs():
    teacher = TEACHERS["one by one"]()
    student = randomised(student_of(teacher, "dd1", 1))
    condition, noise = condition_of(teacher, 3), noise_of(teacher, 3)
    one, two = student.sample(condition, noise), student.sample(condition, noise, steps=(0, 3))
    assert torch.equal(one[:, :3], two[:, :3])
    x = torch.cat((one[:, :3], noise[:, 3:]), dim=1)
    first = student.code_logits(*student.features(condition, x, 3)).argmax(-1)
    made = torch.cat((one[:, :3], teacher.codebook[first][:, 3:]), dim=1)
    second = student.code_logits(*student.features(condition, torch.cat((x, made), dim=-1), 3)).argmax(-1)
    assert torch.equal(two[:, 3:], teacher.codebook[second][:, 3:])


@cases
def test_every_run_learns_and_none_through_the_codes_of_the_one_before(name):
    teacher = TEACHERS[name]()
    noise, part = noise_of(teacher, 4), Part.whole(4, torch.Generator().manual_seed(0))
    codes = torch.randint(teacher.num_codes, noise.shape[:2])
    batch = Batch(noise=noise, condition=condition_of(teacher, 4), codes=codes)
    plain, student = start_student(teacher), start_student(teacher, recycles=1).requires_grad_(True)
    student.load_state_dict(plain.state_dict(), strict=False)
    losses = []
    for one in (plain, student):
        method = DD1(Roles(student=one, teacher=teacher), DD1Config(point=1, point_probability=0.0))
        losses.append(method.step("student", batch, part))
    (once, logged_once), (twice, logged) = losses
    cross_entropy = logged["cross_entropy"]
    assert torch.allclose(cross_entropy, logged_once["cross_entropy"])  # the layer is at 0: both runs are the same
    assert torch.allclose(twice, once + cross_entropy)
    twice.backward()
    assert student.recycled.weight.grad.abs().max() > 0


def test_dd2_learns_in_every_run():
    teacher = TEACHERS["one by one"]()
    batch = Batch(noise=noise_of(teacher, 4), condition=condition_of(teacher, 4))
    plain, student = student_of(teacher, "dd2", 0), student_of(teacher, "dd2", 1)
    student.load_state_dict(plain.state_dict(), strict=False)
    losses = []
    for one in (plain, student):
        method = Matching(Roles(student=one, teacher=teacher), MatchConfig(score_weight=0.0))
        losses.append(method.step("start", batch, Part.whole(4, torch.Generator().manual_seed(0))))
    (once, logged_once), (twice, logged) = losses
    for name in ("anchor", "lookahead"):
        assert torch.allclose(logged[name], logged_once[name])
    assert torch.allclose(twice, 2 * once)
    twice.backward()
    assert student.recycled.weight.grad.abs().max() > 0


@pytest.mark.parametrize("recycles", [-1, 1.5, True, None])
def test_what_is_no_number_of_runs_is_refused(recycles):
    teacher = TEACHERS["one by one"]()
    with pytest.raises(ValueError, match=r"recycles: got .*, expected 0 or more runs after the first"):
        student_of(teacher, "dd1", recycles)


def test_a_run_of_before_goes_on():
    """Its settings do not say that its student does not recycle, whatever its preset does now."""
    config = get_recipe("digits", preset="ddfast")
    settings = plain(config)
    for method in ("dd1", "dd2"):
        del settings[method]["recycles"]
    assert as_then(settings) == plain(config)
    assert config_hash(config.dd1) != config_hash(dataclasses.replace(config.dd1, recycles=1))
    of_before = {field.name: getattr(config.dd1, field.name) for field in dataclasses.fields(config.dd1)}
    del of_before["recycles"]
    assert config_hash(config.dd1) == config_hash(of_before)


@pytest.mark.parametrize("recycles", [0, 1])
@methods
@cases
def test_samples_of_nan_are_an_error_on_any_device(name, method, recycles, monkeypatch):
    """No code stands for them, though an index is found for everything: `argmax` takes NaN for the largest."""
    teacher = TEACHERS[name]()
    student = randomised(student_of(teacher, method, recycles))
    condition, noise = condition_of(teacher, 3), noise_of(teacher, 3)

    def as_on_a_gpu(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        return nearest_code(x.nan_to_num(0, 0, 0), codebook)

    for module in (student_module, flow_network):
        monkeypatch.setattr(module, "nearest_code", as_on_a_gpu, raising=False)
    student.sample(condition, noise)
    with torch.no_grad():
        max(student.parameters(), key=torch.numel).fill_(torch.nan)  # of heads some are without use
    with pytest.raises(ValueError, match="samples hold NaN or infinite values"):
        student.sample(condition, noise)

import pytest
import torch
from small import LABELS, build

from ddfast.models.loading import load_student, load_teacher, save_student
from ddfast.models.student import TransformerStudent
from ddfast.models.toy import ToyTeacher

GROUPS = [(1,) * 7, (1, 2, 4)]


@pytest.mark.parametrize("groups", GROUPS)
def test_a_token_sees_the_condition_earlier_groups_and_itself(groups):
    student = build(groups, trained=True)[1]
    level = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups))
    x = torch.randn(4, 7, 3)
    before = student.predict(LABELS, x, 0)
    assert (student.predict((LABELS + 1) % 3, x, 0)[0] - before[0]).abs().amax((0, 2)).min() > 1e-6
    for token in range(7):
        changed = x.clone()
        changed[:, token] += 1
        for now, then in zip(student.predict(LABELS, changed, 0), before, strict=True):
            moved = (now - then).abs().amax((0, 2)) > 1e-6
            expected = level > level[token]
            expected[token] = True
            assert torch.equal(moved, expected)


@pytest.mark.parametrize("groups", GROUPS)
def test_starts_as_the_teacher(groups):
    teacher, student = build(groups)
    assert torch.equal(student.head.weight, teacher.head.weight)
    assert torch.equal(student.body.blocks[1].qkv.weight, teacher.body.blocks[1].qkv.weight)
    assert torch.equal(student.class_embedding.weight, teacher.class_embedding.weight)
    assert torch.equal(student.position_embedding[0], teacher.position_embedding[0])
    first = groups[0]
    assert torch.equal(student.position_embedding[1 + first :], teacher.position_embedding[first:])
    assert {name for name, _ in student.named_parameters()} - {name for name, _ in teacher.named_parameters()} == {
        "data_embedding.weight",
        "continuous_modulation",
        "continuous_head.weight",
        "continuous_head.bias",
    }


@pytest.mark.parametrize("groups", GROUPS)
def test_points_mark_data_and_noise(groups):
    student = build(groups, trained=True)[1]
    assert student.data_mask(0, 2).sum() == 0
    assert student.data_mask(2, 2)[0].tolist() == [True] * sum(groups[:2]) + [False] * (7 - sum(groups[:2]))
    x = torch.randn(4, 7, 3)
    assert not torch.allclose(student.predict(LABELS, x, 0)[0], student.predict(LABELS, x, 2)[0])
    mixed = student.predict(LABELS, x, torch.tensor([0, 2, 0, 1]))[0]
    assert torch.allclose(mixed[1], student.predict(LABELS, x, 2)[0][1], atol=1e-5)


@pytest.mark.parametrize("groups", GROUPS)
def test_two_steps_keep_the_first_tokens_and_put_the_same_noise_back(groups):
    teacher, student = build(groups, trained=True)
    noise = torch.randn(4, 7, 3)
    one = student.sample(LABELS, noise)
    two = student.sample(LABELS, noise, steps=(0, 2))
    kept = sum(groups[:2])
    assert torch.equal(two[:, :kept], one[:, :kept])
    by_hand = student.predict(LABELS, torch.cat((one[:, :kept], noise[:, kept:]), dim=1), 2)[0].argmax(-1)
    assert torch.equal(two[:, kept:], teacher.codebook[by_hand[:, kept:]])


def test_split_takes_the_continuous_head_from_there_on():
    teacher, student = build((1,) * 7, trained=True)
    noise = torch.randn(4, 7, 3)
    logits, embeddings = student.predict(LABELS, noise, 0)
    mixed = student.sample(LABELS, noise, split=3)
    assert torch.equal(mixed[:, :3], teacher.codebook[logits.argmax(-1)[:, :3]])
    assert torch.equal(mixed[:, 3:], embeddings[:, 3:])


def test_teacher_involved_sampling():
    teacher, student = build((1,) * 7, trained=True)
    noise = torch.randn(4, 7, 3)
    one = student.sample(LABELS, noise)
    involved = student.sample(LABELS, noise, teacher_range=(2, 5))
    prefix = (one[:, None, :2] == teacher.codebook[:, None][None]).all(-1).int().argmax(1)
    codes = teacher.generate(LABELS, sampler="flow", noise=noise, prefix=prefix, stop=5)
    assert torch.equal(involved[:, :5], teacher.codebook[codes])
    rest = student.predict(LABELS, torch.cat((teacher.codebook[codes], noise[:, 5:]), dim=1), 5)[0].argmax(-1)
    assert torch.equal(involved[:, 5:], teacher.codebook[rest[:, 5:]])
    whole = student.sample(LABELS, noise, teacher_range=(0, 7))
    assert torch.equal(whole, teacher.codebook[teacher.generate(LABELS, sampler="flow", noise=noise)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": (1,)}, "steps: got"),
        ({"steps": (0, 9)}, "steps: got"),
        ({"split": 8}, "split: got 8"),
        ({"teacher_range": (3, 3)}, "teacher_range: got"),
    ],
)
def test_errors(arguments, words):
    student = build((1,) * 7)[1]
    with pytest.raises(ValueError, match=words):
        student.sample(LABELS, torch.randn(4, 7, 3), **arguments)


def test_a_point_out_of_range_and_a_wrong_shape():
    student = build((1,) * 7)[1]
    with pytest.raises(ValueError, match="t: got points 8 to 8"):
        student.predict(LABELS, torch.randn(4, 7, 3), 8)
    with pytest.raises(ValueError, match=r"x: got shape \[4, 6, 3\]"):
        student.predict(LABELS, torch.randn(4, 6, 3), 0)


def test_save_and_load(tmp_path):
    teacher, student = build((1,) * 7, trained=True)
    live = {name: value + 1 for name, value in student.state_dict().items()}
    save_student(tmp_path / "student.safetensors", student, {"note": "x"}, live=live)
    noise = torch.randn(4, 7, 3)
    loaded = load_student(tmp_path, teacher)
    assert torch.equal(loaded.sample(LABELS, noise), student.sample(LABELS, noise))
    weight = load_student(tmp_path / "student.safetensors", teacher, ema=False).head.weight
    assert torch.equal(weight, student.head.weight + 1)


def test_files_that_do_not_fit_are_explained(tmp_path):
    from ddfast.errors import DDFastError

    teacher, student = build((1,) * 7)
    path = tmp_path / "student.safetensors"
    save_student(path, student, {})
    with pytest.raises(DDFastError, match=r"position_embedding is \[8, 32\] instead of \[5, 32\]"):
        load_student(path, ToyTeacher())
    with pytest.raises(DDFastError, match="holds averaged weights alone; ema=False asks for the live ones"):
        load_student(path, teacher, ema=False)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DDFastError, match="not a readable safetensors file"):
        load_student(path, teacher)
    with pytest.raises(DDFastError, match="no checkpoint at"):
        load_student(tmp_path / "nothing", teacher)
    path.write_bytes(b"\x80\x04cos\nsystem\n")  # a pickle is never unpickled
    with pytest.raises(DDFastError, match=r"holds something else than tensors.*refused"):
        load_teacher(path)


def test_a_teacher_without_a_transformer_needs_sizes():
    with pytest.raises(ValueError, match="width, depth, heads: ToyTeacher"):
        TransformerStudent(ToyTeacher())

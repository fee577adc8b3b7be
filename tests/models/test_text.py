import dataclasses
import sys

import pytest
import torch

from ddfast import seeds
from ddfast.config import SettingError, TextTeacherConfig, TextTokenizerConfig, TrainConfig
from ddfast.errors import DDFastError
from ddfast.models.loading import build_teacher, load_teacher, untrained_teacher
from ddfast.models.text import ALPHABET, TextTeacher, as_codes, as_texts, reference, windows
from ddfast.models.text.network import on_sphere

TINY = TrainConfig(
    tokenizer=TextTokenizerConfig(),
    teacher=TextTeacherConfig(num_tokens=12, width=32, depth=1, heads=2, iterations=60, batch_size=32),
)


@pytest.fixture(scope="module")
def teacher() -> TextTeacher:
    return untrained_teacher(TINY)


def test_the_split_is_fixed_and_disjoint():
    train, test = (reference(split).splitlines() for split in ("train", "test"))
    assert len(train) > 15 * len(test) > 1000
    assert not set(train) & set(test)
    assert len(set(train)) == len(train)
    assert set(reference("train") + reference("test")) <= set(ALPHABET)
    with pytest.raises(ValueError, match="split: got 'all', expected 'train' or 'test'"):
        reference("all")


def test_texts_are_codes_and_back(teacher):
    texts = ["import this\n", "0123456789~ "]
    codes = as_codes(texts)
    assert codes.shape == (2, 12)
    assert as_texts(codes) == teacher.texts(codes) == teacher.texts(teacher.embed(codes)) == texts
    assert torch.equal(teacher.codes_of(texts), codes)
    with pytest.raises(ValueError, match="texts: got the character 'é', expected"):
        as_codes(["né"])
    with pytest.raises(ValueError, match="texts: got several lengths, expected"):
        as_codes(["a", "bc"])
    with pytest.raises(ValueError, match="texts"):
        teacher.codes_of(["too short"])


def test_windows_are_of_the_text():
    made = windows("test", 5, 30, seeds.generator(0))
    assert made.shape == (5, 30)
    assert all(text in reference("test") for text in as_texts(made))
    assert torch.equal(made, windows("test", 5, 30, seeds.generator(0)))


def test_a_python_without_its_reference(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    reference.cache_clear()
    with pytest.raises(DDFastError, match=r"the recipe text learns from Python's pydoc_data.topics, which this Python"):
        reference("train")


def test_trained_once_then_read_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DDFAST_CACHE", str(tmp_path))
    losses = []
    teacher = build_teacher(TINY, lambda done, total, text: losses.append(float(text.split()[-1])))
    assert len(losses) == TINY.teacher.iterations
    assert losses[-1] < 0.8 * losses[0]
    again = build_teacher(TINY, lambda done, total, text: losses.append(0.0))
    assert len(losses) == TINY.teacher.iterations
    label, codes = torch.zeros(3, dtype=torch.int64), windows("test", 3, 12, seeds.generator(0))
    assert torch.equal(teacher.logits(label, codes), again.logits(label, codes))
    assert torch.equal(teacher.codebook, again.codebook)
    assert not torch.allclose(teacher.codebook, untrained_teacher(TINY).codebook, atol=0.1)
    (path,) = tmp_path.glob("text-teacher-*.safetensors")
    loaded = load_teacher(path)
    assert type(loaded) is TextTeacher
    assert torch.equal(loaded.logits(label, codes), teacher.logits(label, codes))


def test_codes_have_the_size_of_the_noise(teacher):
    length = teacher.codebook.norm(dim=-1)
    torch.testing.assert_close(length, torch.full((96,), 16**0.5))
    assert torch.equal(on_sphere(2 * teacher.codebook), on_sphere(teacher.codebook))


def test_there_is_nothing_to_guide_by(teacher):
    label = torch.zeros(2, dtype=torch.int64)
    for call in (
        lambda: teacher.generate(label, cfg_scale=2.0),
        lambda: teacher.logits(label, torch.zeros(2, 12, dtype=torch.int64), unconditional=True),
    ):
        with pytest.raises(ValueError, match="cfg_scale: a teacher of text has no condition to guide it by"):
            call()
    with pytest.raises(SettingError, match=r"cfg_scale: got 2\.0, expected 1"):
        dataclasses.replace(TINY.teacher, cfg_scale=2.0)
    with pytest.raises(SettingError, match="num_codes: got 64, expected 96"):
        TextTokenizerConfig(num_codes=64)


def test_teachers_of_images_make_no_text():
    teacher = untrained_teacher(TrainConfig())
    assert not teacher.makes_text()
    with pytest.raises(TypeError, match="DigitsTeacher makes no text"):
        teacher.texts(torch.zeros(1, 16, dtype=torch.int64))

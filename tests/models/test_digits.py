import dataclasses

import pytest
import tomli_w
import torch

from ddfast.config import (
    DigitsTeacherConfig,
    DigitsTokenizerConfig,
    TrainConfig,
    config_hash,
    plain,
    read_settings,
)
from ddfast.models.digits.data import digit_batch, digit_images
from ddfast.models.loading import build_teacher, load_teacher, untrained_teacher

TINY = TrainConfig(
    tokenizer=DigitsTokenizerConfig(iterations=30, warmup=10, batch_size=64),
    teacher=DigitsTeacherConfig(width=32, depth=1, heads=2, iterations=20, training_images=500, batch_size=32),
)


def test_the_split_is_fixed_and_disjoint():
    train, _ = digit_images("train")
    test, labels = digit_images("test")
    assert len(train) + len(test) == 1797
    assert len(test) == 300
    assert labels.unique().tolist() == list(range(10))
    rows = {image.numpy().tobytes() for image in train}
    assert not any(image.numpy().tobytes() in rows for image in test)


def test_rendering_is_reproducible_and_varied():
    images, _ = digit_batch("train", 200, seed=3)
    assert images.shape == (200, 1, 16, 16)
    assert torch.equal(images, digit_batch("train", 200, seed=3)[0])
    assert 0 <= images.min() < images.max() <= 1
    borders = images[:, 0, 0, 0]
    assert 0.3 < (borders > 0.5).double().mean() < 0.7  # both polarities


def test_trained_once_then_read_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DDFAST_CACHE", str(tmp_path))
    calls = []
    teacher = build_teacher(TINY, lambda done, total, text: calls.append(done))
    assert len(calls) == 50
    again = build_teacher(TINY, lambda done, total, text: calls.append(done))
    assert len(calls) == 50
    images, labels = digit_batch("test", 8, seed=0)
    codes = teacher.encode(images)
    assert codes.shape == (8, 16)
    assert torch.equal(codes, again.encode(images))
    assert torch.equal(teacher.logits(labels, codes), again.logits(labels, codes))
    (path,) = tmp_path.glob("digits-teacher-*.safetensors")
    assert torch.equal(load_teacher(path).logits(labels, codes), teacher.logits(labels, codes))


@pytest.mark.parametrize(("optimizer", "rate"), [("muon", 7e-3), ("adamw", 2e-3)])
def test_a_teacher_learns_by_either_optimizer(optimizer, rate, tmp_path, monkeypatch):
    monkeypatch.setenv("DDFAST_CACHE", str(tmp_path))
    settings = dataclasses.replace(TINY.teacher, optimizer=optimizer, learning_rate=rate, iterations=60)
    losses = []
    build_teacher(
        dataclasses.replace(TINY, teacher=settings), lambda done, total, text: losses.append(float(text.split()[-1]))
    )
    assert losses[-1] < 0.85 * losses[-60]


def test_a_teacher_of_before_is_the_same(tmp_path):
    """AdamW trained it, which its run's settings do not say; the cache has it under the name that it had."""
    config = TrainConfig(teacher=DigitsTeacherConfig(optimizer="adamw", iterations=1500, learning_rate=2e-3))
    assert config_hash(config.tokenizer, config.teacher, 0) == "329f55722cce"
    assert config_hash(dataclasses.replace(config.teacher, optimizer="muon")) != config_hash(config.teacher)
    settings = plain(config)
    del settings["teacher"]["optimizer"]
    (tmp_path / "config.toml").write_text(tomli_w.dumps(settings))
    assert read_settings(tmp_path / "config.toml") == plain(config)
    (tmp_path / "config.toml").write_text(tomli_w.dumps(plain(TrainConfig())))
    assert read_settings(tmp_path / "config.toml") == plain(TrainConfig())


def test_decoding_accepts_codes_and_embeddings():
    teacher = untrained_teacher(TINY)
    codes = torch.randint(64, (3, 16))
    images = teacher.decode(codes)
    assert images.shape == (3, 1, 16, 16)
    assert torch.equal(images, teacher.decode(teacher.codebook[codes]))
    raw = teacher.decode(codes, clamp=False)
    assert torch.allclose(((raw + 1) / 2).clamp(0, 1), images)

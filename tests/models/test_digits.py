import torch

from ddfast.config import DigitsTeacherConfig, DigitsTokenizerConfig, TrainConfig
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


def test_decoding_accepts_codes_and_embeddings():
    teacher = untrained_teacher(TINY)
    codes = torch.randint(64, (3, 16))
    images = teacher.decode(codes)
    assert images.shape == (3, 1, 16, 16)
    assert torch.equal(images, teacher.decode(teacher.codebook[codes]))
    raw = teacher.decode(codes, clamp=False)
    assert torch.allclose(((raw + 1) / 2).clamp(0, 1), images)

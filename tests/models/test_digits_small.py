"""The small LlamaGen and the small VAR: their training on the digits, their cache, their files."""

import pytest
import torch

from ddfast import seeds
from ddfast.config import DigitsConvTokenizerConfig, update
from ddfast.errors import DDFastError
from ddfast.evaluation import Evaluator
from ddfast.evaluation.sources import sample
from ddfast.models import families
from ddfast.models.converting import export_teacher
from ddfast.models.digits.classifier import DigitsClassifier
from ddfast.models.digits.data import digit_batch
from ddfast.models.digits.training import fit_tokenizer
from ddfast.models.loading import build_teacher, load_teacher, load_tokenizer, untrained_teacher
from ddfast.ops import nearest_code
from ddfast.recipes import get_recipe

RECIPES = ["digits-llamagen", "digits-var"]
BRIEFLY = {
    "tokenizer": {"num_codes": 16, "iterations": 6, "warmup": 2, "batch_size": 8},
    "teacher": {"width": 32, "depth": 1, "heads": 2, "iterations": 4, "batch_size": 8, "training_images": 40},
}


def settings(name, **changed):
    config = get_recipe(name)
    update(config, BRIEFLY)
    update(config, changed)
    return config


def family_of(config):
    return families.of_config(config.teacher)


def colour(images):
    """Grey images as these tokenizers read them."""
    return images.expand(-1, 3, -1, -1)


@pytest.mark.parametrize("name", RECIPES)
def test_trained_once_then_read_from_the_cache(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DDFAST_CACHE", str(tmp_path))
    config, calls = settings(name), []
    teacher = build_teacher(config, lambda done, total, text: calls.append(done))
    assert calls == [*range(1, 7), *range(1, 5)]
    again = build_teacher(config, lambda *_: pytest.fail("trained again"))
    (path,) = tmp_path.glob(f"{name}-teacher-*.safetensors")
    images, labels = digit_batch("test", 8, seed=0)
    codes = teacher.encode(colour(images))
    for other in (again, load_teacher(path)):
        assert type(other) is family_of(config).teacher
        assert other.defaults == teacher.defaults
        assert torch.equal(other.encode(colour(images)), codes)
        assert torch.equal(other.logits(labels, codes), teacher.logits(labels, codes))
        assert torch.equal(other.decode(codes), teacher.decode(codes))
    assert torch.equal(load_tokenizer(path).encode(colour(images), low=0.0), codes)
    build_teacher(settings(name, seed=1), lambda done, total, text: calls.append(done))
    assert len(calls) == 20  # of another seed


@pytest.mark.parametrize("name", RECIPES)
def test_it_goes_into_the_official_layout(name, tmp_path):
    teacher = untrained_teacher(settings(name))
    export_teacher(teacher, tmp_path / "teacher.pth", tmp_path / "tokenizer.pth")
    told = {"n_head": 2, "block_size": 16, "num_classes": 10} if name == "digits-llamagen" else {}
    loaded = load_teacher(tmp_path / "teacher.pth", tmp_path / "tokenizer.pth", **told)
    labels, codes = torch.tensor([3, 9]), torch.randint(16, (2, teacher.num_tokens))
    assert torch.equal(loaded.logits(labels, codes), teacher.logits(labels, codes))
    assert torch.equal(loaded.decode(codes), teacher.decode(codes))


@pytest.mark.parametrize("name", RECIPES)
def test_a_tokenizer_learns_to_reconstruct_and_uses_its_codes(name):
    config = settings(name, tokenizer={"iterations": 60, "warmup": 15, "batch_size": 16, "learning_rate": 3e-3})
    family = family_of(config)
    seeds.seed_all(0)
    tokenizer = family._tokenizer(config)
    images, _ = digit_batch("test", 100, seed=3)

    def error():
        with torch.no_grad():
            return float((tokenizer.decode(tokenizer.encode(colour(images), low=0.0)) - (2 * images - 1)).abs().mean())

    before = error()
    fit_tokenizer(tokenizer, family._quantising(tokenizer), config.tokenizer)
    constant = float((2 * images - 1 - (2 * images - 1).median()).abs().mean())
    assert error() < 0.7 * min(before, constant)
    used = tokenizer.encode(colour(images), low=0.0).unique()
    assert len(used) >= 12  # of 16
    assert not tokenizer.training


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("rounding", [False, True])
def test_what_a_tokenizer_learns_from_is_what_it_does(name, rounding):
    """Codes and images are those of `encode` and `decode`; a vector has its nearest code; the gradient goes through."""
    config = settings(name)
    family = family_of(config)
    seeds.seed_all(0)
    tokenizer = family._tokenizer(config)
    parts = family._quantising(tokenizer)
    images, _ = digit_batch("test", 5, seed=3)
    latents = parts.latents(images).detach().requires_grad_()
    made = parts.rounded(latents, rounding)
    tokens = sum(family.untrained(config).groups)
    assert made.vectors.shape == (5 * tokens, 4)
    assert not made.vectors.requires_grad
    (through,) = torch.autograd.grad(made.latents.sum(), latents)
    assert torch.equal(through, torch.ones_like(through))
    if not rounding:
        assert torch.equal(made.latents, latents)
        return
    codes = tokenizer.encode(colour(images), low=0.0)
    assert sorted(made.codes.tolist()) == sorted(codes.flatten().tolist())
    torch.testing.assert_close(parts.decode(made.latents), tokenizer.decode(codes), atol=1e-5, rtol=1e-5)
    assert torch.equal(nearest_code(made.vectors, tokenizer.codebook()), made.codes)
    (nearer,) = torch.autograd.grad(made.loss, latents)
    with torch.no_grad():
        assert parts.rounded(latents - nearer, True).loss < made.loss


def test_the_codebook_is_written_in_place():
    """What the training moves is what the tokenizer reads."""
    for name in RECIPES:
        tokenizer = family_of(settings(name))._tokenizer(settings(name))
        family_of(settings(name))._quantising(tokenizer).codebook.zero_()[:, 0] = 2.0
        assert tokenizer.codebook()[:, 0].unique().tolist() == [1.0 if name == "digits-llamagen" else 2.0]


def test_scales_that_do_not_end_with_the_latents_are_refused():
    with pytest.raises(DDFastError, match=r"--teacher\.patch-nums: got \(1, 2\), expected the last to be 4, .* 3 --"):
        untrained_teacher(settings("digits-var", teacher={"patch_nums": [1, 2]}))
    assert (
        untrained_teacher(settings("digits-var", teacher={"patch_nums": [1, 2]}, tokenizer={"levels": 4})).num_tokens
        == 5
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 48}, "width: got 48, expected a multiple of 32"),
        ({"levels": 6}, "levels: got 6, expected in 1..5"),
        ({"blocks": 0}, "blocks: got 0"),
    ],
)
def test_sizes_that_do_not_work_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        DigitsConvTokenizerConfig(**settings)


def test_the_classifier_sees_the_mean_of_the_channels():
    network, (images, _) = DigitsClassifier(), digit_batch("test", 20, seed=3)
    assert torch.equal(network.features(images), network.trunk(2 * images - 1))
    shifted = torch.cat([images - 0.1, images, images + 0.1], dim=1)
    torch.testing.assert_close(network.features(shifted), network.features(images), atol=1e-5, rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_teacher_has_learnt_the_digits(name, tmp_path, monkeypatch):
    """Its samples lie near real images, and are of their classes."""
    monkeypatch.setenv("DDFAST_CACHE", str(tmp_path))
    config = get_recipe(name)
    config.evaluation.samples = 2000
    teacher = build_teacher(config)
    measured = Evaluator(config, teacher).measure(sample("teacher", teacher, count=2000, seed=5))
    assert measured["frechet"] < 8
    assert measured["class_accuracy"] > 0.8
    assert 1 < measured["teacher_nll"] < 3
    images, _ = digit_batch("test", 1000, seed=3)
    assert len(teacher.encode(colour(images)).unique()) >= 60  # of 64

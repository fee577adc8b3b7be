"""A seed of 2^32 and more is a seed of its own, wherever one is given; a smaller one is what it is to PyTorch."""

import pytest
import torch
from small import build

from ddfast import seeds
from ddfast.config import DigitsTokenizerConfig, TrainConfig
from ddfast.distill import stages
from ddfast.distill.trainer import _step_seed
from ddfast.evaluation.sources import MEASURED, sample
from ddfast.models.digits.data import digit_batch
from ddfast.models.digits.tokenizer import train_tokenizer
from ddfast.models.llamagen.captions import random_captions
from ddfast.models.loading import untrained_teacher
from ddfast.models.toy import ToyTeacher
from ddfast.recipes import get_recipe

LARGE = [2**32, 2**32 + 7, 2**33, 2**48 + 7, 2**63, 2**64 - 1]


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
def test_small_seeds_are_pytorchs(seed):
    for number in (0, 5_000_003):
        own = torch.rand(9, generator=seeds.generator(seed, number=number))
        assert torch.equal(own, torch.rand(9, generator=manual(seed + number)))
    seeds.seed_all(seed)
    own = torch.rand(9)
    torch.manual_seed(seed)
    assert torch.equal(own, torch.rand(9))
    for step in (0, 5):  # a training step's
        own = torch.rand(9, generator=seeds.generator(_step_seed(seed, step)))
        assert torch.equal(own, torch.rand(9, generator=manual((seed * 1_000_003 + step) % 2**63)))


def manual(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_large_seeds_differ_from_their_remainders_and_from_each_other():
    folded = {seeds.folded(seed) for seed in [*LARGE, *(seed % 2**32 for seed in LARGE)]}
    assert len(folded) == len({*LARGE, *(seed % 2**32 for seed in LARGE)})
    assert all(0 <= value < 2**32 for value in folded)


def network(seed: int) -> torch.Tensor:
    config = get_recipe("digits")
    config.seed, config.dd2.head_width = seed, 8
    return stages.new_network(config, build((1,) * 4)[0], from_teacher=False).head.weight


USES = {
    "teacher": lambda seed: untrained(seed).head.weight,
    "network": network,
    "tokenizer": lambda seed: train_tokenizer(DigitsTokenizerConfig(iterations=1, batch_size=2), seed=seed).codebook,
    "digits": lambda seed: digit_batch("train", 2, seed)[0],
    "captions": lambda seed: random_captions(2, 3, 4, seed=seed)[0],
    "toy": lambda seed: ToyTeacher(seed=seed).tables,
    "step": lambda seed: torch.tensor([_step_seed(seed, 3)]),
    **{
        source: lambda seed, source=source: sample(source, ToyTeacher(), count=60, seed=seed).codes
        for source in MEASURED
        if "student" not in source and source not in ("teacher_involved", "ar_diffusion")
    },
}


def untrained(seed: int):
    config = get_recipe("digits")
    config.seed = seed
    return untrained_teacher(config)


@pytest.mark.parametrize("use", USES)
def test_every_use_takes_the_whole_seed(use):
    made = USES[use]
    small, large = made(3), made(2**32 + 3)
    assert torch.equal(small, made(3))
    assert not torch.equal(small, large)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_other_numbers_are_no_seeds(seed):
    for call in (seeds.generator, seeds.seed_all, lambda seed: TrainConfig(seed=seed)):
        with pytest.raises(ValueError, match=rf"seed: got {seed}, expected 0 to 2\^64 - 1"):
            call(seed)
    with pytest.raises(ValueError, match="seed: got"):
        sample("teacher", ToyTeacher(), count=1, seed=seed)


@pytest.mark.parametrize("seed", [1.0, True, "1"])
def test_what_is_no_integer_is_no_seed(seed):
    with pytest.raises(TypeError, match="seed: got"):
        seeds.generator(seed)


def test_derived_seeds_stay_in_range():
    assert seeds.derived(5, 1_000_003) == 1_000_008
    assert seeds.derived(2**64 - 1, 3) == 2

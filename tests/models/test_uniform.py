"""The uniform numbers that a teacher may draw by, in a generator's place."""

import pytest
import torch
from small import LABELS, build

from ddfast.models.toy import ToyTeacher


@pytest.mark.parametrize("groups", [(1,) * 9, (1, 4, 9)], ids=["tokens", "scales"])
def test_they_are_the_generators_numbers(groups):
    teacher = build(groups, trained=True)[0]
    numbers = torch.rand(4, sum(groups), generator=torch.Generator().manual_seed(3))
    drawn = teacher.generate(LABELS, generator=torch.Generator().manual_seed(3))
    assert torch.equal(teacher.generate(LABELS, uniform=numbers), drawn)
    assert torch.equal(teacher.generate(LABELS, uniform=numbers.double()), drawn)
    stop = teacher.group_starts()[2]
    rest = teacher.generate(LABELS, uniform=numbers, prefix=drawn[:, :stop])
    assert torch.equal(rest, drawn)  # one per token, whether or not it is decoded
    assert torch.equal(teacher.generate(LABELS, uniform=numbers, stop=stop), drawn[:, :stop])
    assert not torch.equal(teacher.generate(LABELS, uniform=1 - 2**-24 - numbers), drawn)


LABEL = torch.tensor([0, 0])


@pytest.mark.parametrize(
    ("error", "words", "settings"),
    [
        (ValueError, "uniform: got values from -0.1 to 0.5", {"uniform": torch.tensor([[-0.1, 0.5, 0.5, 0.5]] * 2)}),
        (ValueError, "uniform: got values from 0 to 1", {"uniform": torch.tensor([[0.0, 1.0, 0.5, 0.5]] * 2)}),
        (ValueError, "uniform: got values from nan", {"uniform": torch.full((2, 4), torch.nan)}),
        (ValueError, "uniform: got values", {"uniform": torch.full((2, 4), 1 - 2**-40, dtype=torch.float64)}),
        (ValueError, r"uniform: got shape \[2, 3\], expected \[2, 4\]", {"uniform": torch.zeros(2, 3)}),
        (TypeError, "uniform: got torch.int64, expected a floating-point", {"uniform": torch.zeros(2, 4).long()}),
        (TypeError, "uniform: got list, expected a floating-point", {"uniform": [[0.5] * 4] * 2}),
        (ValueError, "sampler 'greedy'", {"uniform": torch.zeros(2, 4), "sampler": "greedy"}),
        (ValueError, "a generator too", {"uniform": torch.zeros(2, 4), "generator": torch.Generator()}),
    ],
)
def test_others_are_refused(error, words, settings):
    with pytest.raises(error, match=words):
        ToyTeacher().generate(LABEL, **settings)

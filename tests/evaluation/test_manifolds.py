"""Precision and recall against the definition, written out, and against torch-fidelity's own."""

import inceptions  # noqa: F401  (torchvision, which torch-fidelity imports)
import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from ddfast.evaluation import manifolds
from ddfast.evaluation.manifolds import precision_and_recall


def two_sets(count, other, width=6, seed=0):
    """Float32; the first set lies closer together than the second."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.6 * torch.randn(count, width, generator=generator) + 0.4 + 20.0
    return x, torch.randn(other, width, generator=generator) + 20.0


def by_definition(samples, reference, k):
    """As OpenAI's evaluator has it: a ball around each of a set, to its k-th nearest other one."""
    x, y = (np.asarray(one, dtype=np.float64) for one in (samples, reference))

    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    def radii(a):
        apart = distances(a, a)
        np.fill_diagonal(apart, np.inf)
        return np.sort(apart, axis=1)[:, k - 1]

    precise = (distances(x, y) <= radii(y)[None]).any(1).mean()
    recalled = (distances(y, x) <= radii(x)[None]).any(1).mean()
    return precise, recalled


@pytest.mark.parametrize(("count", "other", "k"), [(120, 90, 3), (60, 200, 1), (4, 5, 3)])
def test_definition(count, other, k, monkeypatch):
    x, y = two_sets(count, other)
    expected = by_definition(x, y, k)
    assert precision_and_recall(x, y, neighbour=k) == expected
    monkeypatch.setattr(manifolds, "_BLOCK", 300)
    assert precision_and_recall(x, y, neighbour=k) == expected


@pytest.mark.parametrize("whole", [True, False])
def test_torch_fidelity(whole):
    x, y = two_sets(150, 130, seed=1)
    theirs = prc_features_to_metric(x, y, prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=not whole, verbose=False)
    precision, recall = precision_and_recall(x, y)
    assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)
    assert 0.3 < recall < precision < 1


def test_images_that_are_there_twice():
    x, y = two_sets(40, 30, seed=2)
    doubled = torch.cat((x, x))
    assert precision_and_recall(doubled, y) == by_definition(doubled, y, 3)
    assert precision_and_recall(y, y) == (1.0, 1.0)


def test_too_few():
    x, y = two_sets(3, 30)
    with pytest.raises(ValueError, match="samples: got 3, expected more than 3"):
        precision_and_recall(x, y)

"""Moments, Fréchet distances and their spread, against closed forms and against distances taken without covariances."""

import functools

import numpy as np
import pytest
import torch
from launching import launch

from ddfast import processes
from ddfast.frechet import GROUPS, Gaussian, Moments, frechet_distance, frechet_error, group_of


def features(count, width, seed, scale=1.0):
    """Float64, with a covariance of many sizes and means far from zero."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator, dtype=torch.float64)
    spread = torch.logspace(0, -3, width, dtype=torch.float64)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64) * spread
    return scale * rows @ mixed / width**0.5 + torch.randn(width, generator=generator, dtype=torch.float64)


def by_singular_values(x, y):
    """The distance without any covariance: the root's trace is the nuclear norm of one set times the other."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    left, right = ((rows - rows.mean(0)) / np.sqrt(len(rows) - 1) for rows in (x, y))
    root = np.linalg.svd(left @ right.T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (left**2).sum() + (right**2).sum() - 2 * root


def gaussian(covariance, mean=None):
    covariance = torch.tensor(covariance, dtype=torch.float64)
    mean = (
        torch.zeros(len(covariance), dtype=torch.float64) if mean is None else torch.tensor(mean, dtype=torch.float64)
    )
    return Gaussian(mean, covariance)


def test_samples_of_known_gaussians():
    """|m|^2 + sum (s1 - s2)^2 for diagonal covariances."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 3, generator=generator) * torch.tensor([1.0, 2.0, 0.5])
    y = torch.randn(200_000, 3, generator=generator) * torch.tensor([2.0, 2.0, 1.0]) + torch.tensor([1.0, 0.0, -2.0])
    assert frechet_distance(Gaussian.of(x), Gaussian.of(y)) == pytest.approx(1 + 4 + 1 + 0.25, rel=0.02)


def test_two_by_two():
    """tr (S1 S2)^(1/2) = (tr S1 S2 + 2 (det S1 det S2)^(1/2))^(1/2)."""
    one, two = [[2.0, 0.5], [0.5, 1.0]], [[1.0, -0.3], [-0.3, 3.0]]
    a, b = np.array(one), np.array(two)
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    expected = 5 + np.trace(a + b) - 2 * root
    assert frechet_distance(gaussian(one, [1.0, 2.0]), gaussian(two)) == pytest.approx(expected, rel=1e-14)


def test_singular_covariances():
    """Of a line through the origin: tr (S1 a a^T)^(1/2) = (a^T S1 a)^(1/2)."""
    line, full = np.array([1.0, 2.0, 0.0]), np.diag([1.0, 4.0, 9.0])
    expected = 14 + 5 - 2 * np.sqrt(line @ full @ line)
    thin = np.outer(line, line)
    assert frechet_distance(gaussian(full), gaussian(thin)) == pytest.approx(expected, rel=1e-14)
    assert frechet_distance(gaussian(thin), gaussian(full)) == pytest.approx(expected, rel=1e-14)
    nothing = gaussian(np.zeros((3, 3)))
    assert frechet_distance(nothing, nothing) == 0
    assert frechet_distance(gaussian(full), nothing) == 14 == frechet_distance(nothing, gaussian(full))


@pytest.mark.parametrize(("count", "other"), [(400, 300), (20, 300), (300, 20), (20, 30), (2, 3)])
def test_fewer_samples_than_features(count, other):
    """Covariances of any rank, where eigenvalues of rounding have roots that are none."""
    x, y = features(count, 64, 1), features(other, 64, 2)
    expected = by_singular_values(x, y)
    assert frechet_distance(Gaussian.of(x), Gaussian.of(y)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(Gaussian.of(x), Gaussian.of(x)) == pytest.approx(0, abs=1e-7)


def test_statistics_are_numpys():
    x = features(301, 7, 3)
    fitted = Gaussian.of(x)
    assert np.allclose(fitted.mean, x.numpy().mean(0), rtol=1e-14)
    assert np.allclose(fitted.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-11, atol=1e-16)
    assert fitted.count == 301


def test_means_that_are_far_away():
    """Sums of squares would have lost eight of sixteen digits."""
    x = features(500, 5, 4)
    near, far = Gaussian.of(x), Gaussian.of(x + 1e4)
    assert torch.allclose(near.covariance, far.covariance, rtol=1e-7)


@pytest.mark.parametrize("numbers", [range(10_000), range(30_000, 40_000), range(7, 1_000_000, 1000)])
def test_groups_are_of_equal_size(numbers):
    """Of the whole, of 10,000 that follow each other (200 classes of 50), and of one of 1000 classes in turn."""
    groups = group_of(torch.tensor(numbers, dtype=torch.int64))
    sizes = torch.bincount(groups, minlength=GROUPS).double() / len(numbers)
    assert len(sizes) == GROUPS
    assert (sizes - 1 / GROUPS).abs().max() < 0.005


def test_groups_have_as_many_of_a_class():
    """Of 50 of each of 1000 classes, in turn: 10 of each class in every group, give or take two."""
    groups = group_of(torch.arange(50_000, dtype=torch.int64)).view(50, 1000)
    counts = torch.stack([(groups == group).sum(0) for group in range(GROUPS)])
    assert (counts - 10).abs().max() <= 2


def summed(batch, shuffled=False):
    """Moments of 200 samples, by as many processes as there are."""
    x, number = features(200, 6, 5), torch.arange(200, dtype=torch.int64)
    if shuffled:
        number = number[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    moments = Moments()
    for rows in processes.share(number.split(batch)):
        moments.add(x[rows].float(), rows)
    return moments.shared()


def together(batch):
    with processes.together("cpu", 60):
        return vars(summed(batch))


def same(one, other):
    assert torch.equal(one["count"], other["count"])
    for name in ("mean", "scatter"):
        assert torch.allclose(one[name], other[name], rtol=1e-12, atol=1e-13)


def test_batches_order_and_processes_do_not_matter():
    """The last of three processes has nothing where there are two batches."""
    whole = vars(summed(200))
    same(whole, vars(summed(7)))
    same(whole, vars(summed(1, shuffled=True)))
    for end in launch(3, together, 100):
        same(whole, end)


def test_the_error_is_the_spread():
    """Of many sets of samples, the distances' standard deviation is what each set says of itself."""
    reference = Gaussian.of(features(20_000, 4, 6))
    mixed = features(200_000, 4, 6).split(1000)
    values, errors = [], []
    for rows in mixed:
        moments = Moments()
        moments.add(rows * 1.2 + 0.1, torch.arange(1000, dtype=torch.int64))
        values.append(frechet_distance(moments, reference))
        errors.append(frechet_error(moments, reference))
    spread = float(np.std(values))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(spread, rel=0.15)


def test_few_samples_have_no_error():
    moments = Moments()
    moments.add(features(7, 3, 7), torch.arange(7, dtype=torch.int64))
    assert frechet_error(moments, Gaussian.of(features(9, 3, 8))) is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Gaussian.of(features(1, 3, 0)), "got 1 samples, expected at least 2"),
        (lambda: Gaussian.of(torch.full((3, 2), torch.nan)), "NaN"),
        (lambda: frechet_distance(gaussian(np.eye(2)), gaussian(np.eye(3))), "got 3 features"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_widths_do_not_change():
    moments = Moments()
    add = functools.partial(moments.add, number=torch.arange(4, dtype=torch.int64))
    add(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="got 2 of a sample, expected 3"):
        add(torch.zeros(4, 2))

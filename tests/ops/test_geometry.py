import math

import torch

from ddfast.ops import geometry
from ddfast.ops.geometry import codebook_geometry


def test_distances():
    codebook = torch.randn(1500, 6)
    found = codebook_geometry(codebook)
    distance = torch.cdist(codebook.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert found.diameter >= distance.max()
    distance.fill_diagonal_(torch.inf)
    assert torch.allclose(found.nearest.double(), distance.amin(-1), atol=1e-5)
    assert torch.equal(found.packed[:-1], found.nearest)


def test_a_large_codebook_is_multiplied(monkeypatch):
    """As right as by differences, far from the origin too and of codes that nearly are one."""
    codebook = torch.randn(700, 40) + 9
    codebook[1] = codebook[0]
    codebook[3] = codebook[2] + 1e-4
    by_differences = geometry._compute(codebook)
    monkeypatch.setattr(geometry, "_MOST_DIFFERENCES", 0)
    monkeypatch.setattr(geometry, "_MOST_HELD", 70_000)
    by_products = geometry._compute(codebook)
    assert torch.allclose(by_products.nearest, by_differences.nearest, rtol=1e-3, atol=1e-6)
    assert math.isclose(by_products.sigma_min, by_differences.sigma_min, rel_tol=1e-5)


def test_is_remembered_until_the_codebook_changes():
    codebook = torch.randn(50, 3)
    first = codebook_geometry(codebook)
    assert codebook_geometry(codebook.detach()) is first
    codebook.mul_(2)
    second = codebook_geometry(codebook)
    assert second is not first
    assert abs(second.sigma_min / first.sigma_min - 2) < 1e-3


def test_new_memory_at_an_old_address_is_not_mistaken():
    for scale in (1.0, 3.0, 9.0):
        codebook = torch.full((20, 3), scale) * torch.arange(20)[:, None]
        assert abs(codebook_geometry(codebook).nearest[0] - scale * 3**0.5) < 1e-4
        del codebook


def test_degenerate_codebooks_have_a_positive_grid_end():
    for codebook in (torch.ones(1, 3), torch.ones(5, 3), torch.tensor([[0.0], [0.0], [0.0], [1.0]])):
        assert codebook_geometry(codebook).sigma_min > 0


def test_inference_tensors_are_accepted():
    with torch.inference_mode():
        codebook = torch.randn(10, 3)
        assert codebook_geometry(codebook).nearest.shape == (10,)

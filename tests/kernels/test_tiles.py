"""Kernels give the same whatever tile tuning chooses, a program of one token included."""

import pytest
import torch
from tiles import use_tile
from truth import problem

from ddfast import env
from ddfast.ops import codebook_posterior, flow_sample, nearest_code

pytestmark = pytest.mark.skipif(not env.triton_interpreted(), reason="needs Triton's interpreter")

TILES = [(1, 64), (16, 32), (64, 128)]


@pytest.fixture(params=TILES, ids=str)
def tile(request, monkeypatch) -> tuple[int, int]:
    use_tile(monkeypatch, *request.param)
    return request.param


@pytest.mark.parametrize("dim", [3, 8, 33])
def test_flow(tile, dim):
    log_probs, noise, codebook = (tensor.float() for tensor in problem(9, 150, dim, support=0.5, seed=5))
    codes, _ = flow_sample(log_probs, noise, codebook, backend="triton")
    assert torch.equal(codes, flow_sample(log_probs, noise, codebook, backend="reference")[0])


def test_posterior(tile):
    log_probs, x, codebook = (tensor.float() for tensor in problem(10, 100, 8, support=0.5, seed=6))
    grads = []
    for backend in ("triton", "reference"):
        leaf = x.view(2, 5, 8).clone().requires_grad_()
        mean = codebook_posterior(leaf, 0.4, log_probs[:5], codebook, backend=backend)
        grads.append((mean.detach(), *torch.autograd.grad(mean.square().sum(), leaf)))
    assert all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(*grads, strict=True))


def test_nearest(tile):
    if tile[0] == 1:
        pytest.skip("its tiles have 16 rows and more")
    x, codebook = torch.randn(70, 8), torch.randn(300, 8)
    assert torch.equal(nearest_code(x, codebook, backend="triton"), nearest_code(x, codebook, backend="reference"))

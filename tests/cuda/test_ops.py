"""The ops' way to the CUDA kernels: the same calls that go to the compiled module on a GPU, into the emulator."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from emulation import (
    DrawArguments,
    FilterArguments,
    FlowArguments,
    NearestArguments,
    NoiseArguments,
    PosteriorArguments,
)
from truth import problem

from ddfast.ops import (
    codebook_posterior,
    dispatch,
    draw_codes,
    filter_logits,
    flow_sample,
    native,
    nearest_code,
    noise,
    sample_codes,
)


@pytest.fixture(autouse=True, params=["past the end", "before the beginning"])
def module(emulator, monkeypatch, request):
    """A module with the compiled one's signatures, and the backend "cuda" on the CPU's tensors.

    Everything with accesses beyond a tensor failing on one side of it, then on the other.
    """
    emulator.configure(front=request.param == "before the beginning")
    library, check = emulator.library, emulator.check

    def flow_scratch_bytes(rows, num_codes, dim, top_k, top_p, cluster, device):
        size = ctypes.c_int64()
        counts = [ctypes.c_int64(value) for value in (rows, num_codes, dim, top_k)]
        check(library.flow_scratch_emulated(*counts, ctypes.c_double(top_p), cluster, ctypes.byref(size)))
        return size.value

    def filter_scratch_bytes(rows, num_codes, cluster, device):
        size = ctypes.c_int64()
        check(library.filter_scratch_emulated(*map(ctypes.c_int64, (rows, num_codes)), cluster, ctypes.byref(size)))
        return size.value

    def filtering(
        logits, dtype, stride, uncond, uncond_stride, cfg_scale, temperature, top_k, top_p, log_probs, scratch, rows,
        num_codes, cluster, *_,
    ):  # fmt: skip
        arguments = FilterArguments(
            logits, uncond, cfg_scale, stride, uncond_stride, rows, num_codes, top_k, top_p, temperature, dtype
        )
        check(library.filter_emulated(ctypes.byref(arguments), *map(ctypes.c_void_p, (log_probs, scratch)), cluster))

    def draw_scratch_bytes(rows, num_codes, cluster, device):
        size = ctypes.c_int64()
        check(library.draw_scratch_emulated(*map(ctypes.c_int64, (rows, num_codes)), cluster, ctypes.byref(size)))
        return size.value

    def draw(
        logits, dtype, stride, uncond, uncond_stride, cfg_scale, temperature, top_k, top_p, uniform, codes, scratch,
        rows, num_codes, cluster, *_,
    ):  # fmt: skip
        rows_of_logits = FilterArguments(
            logits, uncond, cfg_scale, stride, uncond_stride, rows, num_codes, top_k, top_p, temperature, dtype
        )
        arguments = DrawArguments(rows_of_logits, uniform, codes, scratch)
        check(library.draw_emulated(ctypes.byref(arguments), cluster))

    def sample(
        logits, dtype, stride, uncond, uncond_stride, cfg_scale, temperature, top_k, top_p, noise, codebook, geometry,
        codes, evaluations, scratch, rows, num_codes, dim, steps, solver, sigma_min, early_exit, cluster, *_,
    ):  # fmt: skip
        rows_of_logits = FilterArguments(
            logits, uncond, cfg_scale, stride, uncond_stride, rows, num_codes, top_k, top_p, temperature, dtype
        )
        arguments = FlowArguments(
            rows_of_logits, noise, codebook, geometry, codes, evaluations, scratch, dim, sigma_min, steps, solver,
            early_exit,
        )  # fmt: skip
        check(library.flow_sample_emulated(ctypes.byref(arguments), cluster))

    def flow(log_probs, dtype, stride, *rest):
        sample(log_probs, dtype, stride, 0, 0, 0, 1.0, 0, 1.0, *rest)

    def posterior(grad, dx, x, t, log_probs, dtype, stride, period, codebook, x0, log_norm, rows, num_codes, dim):
        arguments = PosteriorArguments(
            x, t, log_probs, codebook, x0, log_norm, grad, dx, stride, rows, period, num_codes, dim, dtype
        )
        check(library.posterior_emulated(ctypes.byref(arguments), dx is not None))

    def forward(*arguments):
        posterior(None, None, *arguments[:-2])

    def backward(grad, x, t, log_probs, dtype, stride, period, codebook, x0, log_norm, dx, *sizes):
        posterior(grad, dx, x, t, log_probs, dtype, stride, period, codebook, x0, log_norm, *sizes[:-2])

    def nearest(x, codebook, codes, rows, num_codes, dim, cosine, cluster, device, stream):
        arguments = NearestArguments(x, codebook, codes, rows, num_codes, dim, cosine)
        check(library.nearest_emulated(ctypes.byref(arguments), cluster))

    def normals(seed, index, count, per_sample, out, device, stream):
        check(library.noise_emulated(ctypes.byref(NoiseArguments(index, out, seed, count, per_sample))))

    stand_in = SimpleNamespace(
        max_dim=64, filter_scratch_bytes=filter_scratch_bytes, filter_logits=filtering,
        draw_scratch_bytes=draw_scratch_bytes, draw_codes=draw,
        flow_scratch_bytes=flow_scratch_bytes, sample_codes=sample, flow_sample=flow, nearest_code=nearest,
        codebook_posterior_forward=forward, codebook_posterior_backward=backward,
        noise=normals,
    )  # fmt: skip
    monkeypatch.setattr(native, "cuda", stand_in)
    monkeypatch.setitem(dispatch.DEVICE_OF, "cuda", "cpu")
    monkeypatch.setattr(dispatch, "missing", lambda *_: {})


def test_nearest_code():
    x, codebook = torch.randn(2, 20, 8), torch.randn(100, 8)
    for cosine in (False, True):
        ours = nearest_code(x, codebook, cosine=cosine, backend="cuda")
        assert torch.equal(ours, nearest_code(x, codebook, cosine=cosine, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codebook_posterior(dtype):
    log_probs, x, codebook = (tensor.float() for tensor in problem(12, 60, 8, support=0.5))
    results = []
    for backend in ("cuda", "reference"):
        leaf = x.view(3, 4, 8).clone().requires_grad_()
        mean = codebook_posterior(leaf, 0.5, log_probs[:4].to(dtype), codebook, backend=backend)
        (grad,) = torch.autograd.grad(mean.square().sum(), leaf)
        results.append((mean.detach(), grad))
    assert all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filter(dtype):
    logits, uncond = (torch.randn(2, 3, 90).to(dtype) for _ in range(2))
    settings = {"uncond": uncond, "cfg_scale": 1.7, "temperature": 0.9, "top_k": 30, "top_p": 0.9}
    ours, exact = (filter_logits(logits, **settings, backend=backend) for backend in ("cuda", "reference"))
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draw(dtype):
    logits, uncond = (torch.randn(2, 3, 90).to(dtype) for _ in range(2))
    settings = {"uncond": uncond, "cfg_scale": 1.7, "temperature": 0.9, "top_k": 30, "top_p": 0.9}
    for uniform in (torch.rand(2, 3, dtype=torch.float64), torch.zeros(3, 2).T):
        codes, exact = (draw_codes(logits, uniform, **settings, backend=name) for name in ("cuda", "reference"))
        assert torch.equal(codes, exact)


def test_flow():
    log_probs, noise, codebook = (tensor.float() for tensor in problem(6, 90, 8, support=0.5))
    shaped = log_probs.view(2, 3, 90), noise.view(2, 3, 8)
    codes, _ = flow_sample(*shaped, codebook, backend="cuda")
    assert torch.equal(codes, flow_sample(*shaped, codebook, backend="reference")[0])
    filters = {"uncond": torch.randn(2, 3, 90), "cfg_scale": 1.7, "temperature": 0.9, "top_k": 30, "top_p": 0.9}
    codes, _ = sample_codes(*shaped, codebook, **filters, backend="cuda")
    assert torch.equal(codes, sample_codes(*shaped, codebook, **filters, backend="reference")[0])


def test_noise():
    index = torch.tensor([[3, -1], [2**40, 0]])
    assert torch.equal(noise(5, index, (3, 7), backend="cuda"), noise(5, index, (3, 7), backend="reference"))


def test_errors():
    with pytest.raises(ValueError, match="logits: row 1 has NaN"):
        filter_logits(torch.zeros(3, 5).index_fill(0, torch.tensor(1), torch.nan), backend="cuda")
    with pytest.raises(ValueError, match="log_probs: row 2 has NaN"):
        flow_sample(torch.zeros(3, 5).index_fill(0, torch.tensor(2), torch.nan), torch.randn(3, 4), torch.randn(5, 4),
                    backend="cuda")  # fmt: skip
    with pytest.raises(ValueError, match="logits: row 1 has NaN"):
        draw_codes(torch.zeros(3, 5).index_fill(0, torch.tensor(1), -torch.inf), torch.zeros(3), backend="cuda")
    with pytest.raises(ValueError, match="codes have 65 dimensions, it takes 64 at most"):
        nearest_code(torch.randn(2, 65), torch.randn(3, 65), backend="cuda")

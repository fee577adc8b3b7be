"""Every op's GPU kernels against the references, on a GPU if there is one, else in Triton's interpreter at small sizes.

pytest tests/gpu -m gpu
"""

import math

import pytest
import torch
from tiles import use_tile
from truth import TOLERANCE, problem

import ddfast
from ddfast import env, ops
from ddfast.ops import dispatch
from ddfast.ops.flow_sample import SOLVERS

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = [name for name in ("triton", "cuda") if name in dispatch.available()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 33, 4095, 16385] if GPU else [1, 33]
ROWS = 1000 if GPU else 5

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (GPU or env.triton_interpreted()), reason="needs a GPU, or Triton's interpreter"),
]
needs_a_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    """Of Triton's configurations one: tuning would compile five for every shape."""
    if request.param == "triton" and GPU:
        use_tile(monkeypatch, 16, 32)
    return request.param


def moved(*tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [tensor.to(DEVICE, dtype) for tensor in tensors]


def float32(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same values on the CPU, for a reference."""
    return [tensor.float().cpu() for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 8, 32, 33, 64])
@pytest.mark.parametrize("num_codes", SIZES)
def test_nearest_code(backend, num_codes, dim, dtype):
    x, codebook = moved(torch.randn(ROWS, dim), torch.randn(num_codes, dim), dtype=dtype)
    codes = ops.nearest_code(x, codebook, backend=backend).cpu()
    x, codebook = (tensor.double() for tensor in float32(x, codebook))
    chosen, best = (x - codebook[codes]).square().sum(-1), torch.cdist(x, codebook).amin(-1).square()
    assert (chosen - best <= 4e-6 * (x.square().sum(-1) + codebook.square().sum(-1).max())).all()


@pytest.mark.parametrize("cosine", [False, True])
def test_nearest_code_ties_go_to_the_lowest_index(backend, cosine):
    codebook = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], device=DEVICE).repeat(40, 1)
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]], device=DEVICE)
    assert ops.nearest_code(x, codebook, cosine=cosine, backend=backend).tolist() == [1, 0, 0]


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 900, "top_p": 0.95}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_codes", SIZES)
def test_filter_logits(backend, num_codes, dtype, filters):
    rows = ROWS // 4 + 1
    logits, uncond = moved(3 * torch.randn(rows, num_codes), torch.randn(rows, num_codes), dtype=dtype)
    logits[0] = logits[0, 0]  # all tied
    logits[:, num_codes // 2] = -math.inf if num_codes > 1 else 0.0
    for guidance in ({}, {"uncond": uncond, "cfg_scale": 2.0}):
        ours = ops.filter_logits(logits, **guidance, **filters, temperature=0.9, backend=backend).cpu()
        if guidance:
            guidance["uncond"] = uncond.float().cpu()
        exact = ops.filter_logits(logits.float().cpu(), **guidance, **filters, temperature=0.9, backend="reference")
        both = (ours > -math.inf) & (exact > -math.inf)
        # A sum that lies within rounding of top_p may fall either way.
        assert ((ours > -math.inf) != (exact > -math.inf)).sum(-1).max() <= (1 if "top_p" in filters else 0)
        assert (ours - exact)[both].abs().max() <= TOLERANCE["filter_logits", torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_codes", "dim"), [(1, 3), (33, 1), (512, 8), (512, 32), (4095, 64)][: None if GPU else 4])
@pytest.mark.parametrize("draws", [1, 3])
def test_codebook_posterior(backend, num_codes, dim, dtype, draws):
    log_probs, noise, codebook = problem(ROWS, num_codes, dim, support=0.5, seed=3)
    t = 0.1 + 0.9 * torch.rand(draws, ROWS)
    x = ((1 - t[..., None]) * codebook[0] + t[..., None] * torch.randn(draws, *noise.shape)).float()
    x, log_probs, codebook = moved(x, log_probs, codebook, dtype=dtype)
    upstream, t = torch.randn(x.shape, dtype=torch.float32).to(DEVICE, dtype), t.to(DEVICE)
    leaf, exact_leaf = x.requires_grad_(), x.detach().cpu().double().requires_grad_()
    ours = ops.codebook_posterior(leaf, t, log_probs, codebook, backend=backend)
    exact = ops.codebook_posterior(exact_leaf, t.cpu().double(), log_probs.cpu().double(), codebook.cpu().double())
    (grad,) = torch.autograd.grad(ours, leaf, upstream)
    (exact_grad,) = torch.autograd.grad(exact, exact_leaf, upstream.cpu().double())
    size = codebook.abs().max().item() + 1
    times = t.cpu().double()[..., None]
    tolerance = TOLERANCE["codebook_posterior", dtype] * size * (1 + 2e-3 / times.square()) * math.sqrt(dim)
    assert ((ours.detach().cpu().double() - exact.detach()).abs() <= tolerance).all()
    gain = (1 - times) / times.square() * size**2
    assert ((grad.cpu().double() - exact_grad).abs() <= 10 * tolerance * (1 + gain)).all()


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("support", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("num_codes", "dim"), [(1, 3), (64, 4), (512, 32), (4095, 8), (16385, 64)][: None if GPU else 2]
)
def test_flow_sample(backend, num_codes, dim, support, solver):
    log_probs, noise, codebook = moved(*problem(ROWS, num_codes, dim, support=support, seed=4))
    codes, x = ops.flow_sample(log_probs, noise, codebook, solver=solver, backend=backend)
    exact, _ = ops.flow_sample(*float32(log_probs, noise, codebook), solver=solver, backend="reference")
    # Tokens on a basin's boundary may fall either way; early exit answers for the exact flow.
    assert (codes.cpu() != exact).sum() <= (2 if solver == "dpm3m" else 0.05 * ROWS) + 0.005 * ROWS
    assert torch.equal(x, codebook[codes])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample_codes(backend, dtype):
    num_codes = 4096 if GPU else 200
    logits, uncond = moved(2 * torch.randn(ROWS, num_codes), torch.randn(ROWS, num_codes), dtype=dtype)
    noise, codebook = moved(torch.randn(ROWS, 8), torch.randn(num_codes, 8))
    settings = {"cfg_scale": 1.5, "temperature": 1.1, "top_k": num_codes // 4, "top_p": 0.95}
    codes, _ = ops.sample_codes(logits, noise, codebook, uncond=uncond, **settings, backend=backend)
    log_probs = ops.filter_logits(logits, uncond=uncond, **settings, backend=backend)
    apart, _ = ops.flow_sample(log_probs, noise, codebook, backend=backend)
    assert (codes != apart).sum() <= 0.002 * ROWS + 1


@pytest.mark.parametrize("seed", [0, 2**63 + 5, 2**64 - 1])
def test_noise_is_the_same_everywhere(backend, seed):
    index = torch.tensor([0, 1, 2**31, 2**33 + 7, 5, 2**62])
    reference = ddfast.noise(seed, index, (257,), backend="reference")
    assert torch.equal(ddfast.noise(seed, index, (257,), DEVICE, backend=backend).cpu(), reference)


def test_rows_by_strides(backend):
    log_probs, noise, codebook = moved(*problem(24, 30, 4))
    codes, _ = ops.flow_sample(
        log_probs.view(4, 6, 30).transpose(0, 1), noise.view(4, 6, 4).transpose(0, 1), codebook, backend=backend
    )
    assert torch.equal(codes.T.reshape(-1), ops.flow_sample(log_probs, noise, codebook, backend=backend)[0])


@needs_a_gpu
def test_bad_rows_are_marked_without_waiting(backend):
    log_probs, noise, codebook = moved(*problem(8, 50, 4))
    log_probs[1], log_probs[2, 3], log_probs[3, 4], noise[5, 0] = -math.inf, math.nan, math.inf, math.inf
    codes, _ = ops.flow_sample(log_probs, noise, codebook, backend=backend)
    assert (codes == -1).nonzero()[:, 0].tolist() == [1, 2, 3, 5]
    assert ops.filter_logits(log_probs, backend=backend).isnan().all(-1).nonzero()[:, 0].tolist() == [1, 2, 3]


@needs_a_gpu
def test_same_bits_every_time(backend):
    log_probs, noise, codebook = moved(*problem(300, 1000, 8))
    x = noise.clone().requires_grad_()
    results = []
    for _ in range(3):
        mean = ops.codebook_posterior(x, 0.3, log_probs, codebook, backend=backend)
        (grad,) = torch.autograd.grad(mean.sum(), x)
        results.append((mean, grad, ops.flow_sample(log_probs, noise, codebook, backend=backend)[0]))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@needs_a_gpu
def test_in_a_cuda_graph(backend):
    logits, noise, codebook = moved(torch.randn(64, 4096), torch.randn(64, 8), torch.randn(4096, 8))

    def step() -> torch.Tensor:
        return ops.sample_codes(logits, noise, codebook, top_k=900, backend=backend)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles and tunes
        step()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = step()
    logits.copy_(torch.randn_like(logits))
    graph.replay()
    assert torch.equal(codes, step())


@needs_a_gpu
def test_offsets_beyond_31_bits(backend):
    """2.2 G log-probabilities; the last rows are as right as the first."""
    rows, num_codes = 34_000, 65_536
    log_probs = torch.zeros(rows, num_codes, dtype=torch.float16, device=DEVICE)
    wanted = torch.randint(num_codes, (rows,), device=DEVICE)
    log_probs.fill_(-math.inf).scatter_(1, wanted[:, None], 0.0)
    codebook = torch.randn(num_codes, 4, device=DEVICE)
    codes, _ = ops.flow_sample(log_probs, torch.randn(rows, 4, device=DEVICE), codebook, backend=backend)
    assert torch.equal(codes, wanted)
    mean = ops.codebook_posterior(torch.randn(rows, 4, device=DEVICE), 0.5, log_probs, codebook, backend=backend)
    assert torch.allclose(mean, codebook[wanted], atol=1e-5)

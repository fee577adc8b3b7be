"""Every op's GPU kernels against the references on a GPU.

Without one, Triton's interpreter runs a case or two of each, so that these tests themselves keep working: what they say
of the formulas, tests/ops says there of every dtype and size.

pytest tests/gpu -m gpu
"""

import math

import pytest
import torch
from truth import TOLERANCE, problem

import ddfast
from ddfast import env, ops
from ddfast.ops import dispatch
from ddfast.ops.flow_sample import SOLVERS

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = [name for name in ("triton", "cuda") if name in dispatch.available()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16][: None if GPU else 1]
SIZES = [1, 7, 33, 4095, 16385] if GPU else [33]
ROWS = 1000 if GPU else 5
FILTERS = [{"top_k": 900, "top_p": 0.95}, {"top_k": 5}, {"top_p": 0.8}, {}][: None if GPU else 1]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (GPU or env.triton_interpreted()), reason="needs a GPU, or Triton's interpreter"),
]
needs_a_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def moved(*tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [tensor.to(DEVICE, dtype) for tensor in tensors]


def float32(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same values on the CPU, for a reference."""
    return [tensor.float().cpu() for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 1, 32, 33, 64][: None if GPU else 1])
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


@pytest.mark.parametrize("filters", FILTERS, ids=str)
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
@pytest.mark.parametrize(("num_codes", "dim"), [(33, 1), (1, 3), (512, 8), (512, 32), (4095, 64)][: None if GPU else 1])
@pytest.mark.parametrize("draws", [3, 1][: None if GPU else 1])
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


@pytest.mark.parametrize("solver", sorted(SOLVERS)[: None if GPU else 1])
@pytest.mark.parametrize("support", [0.3, 0.0, 1.0][: None if GPU else 1])
@pytest.mark.parametrize(
    ("num_codes", "dim"), [(64, 4), (1, 3), (512, 32), (4095, 8), (16385, 64)][: None if GPU else 1]
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


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("num_codes", SIZES)
def test_draw_codes(backend, num_codes, filters):
    rows = ROWS // 4 + 1
    logits, uncond = moved(3 * torch.randn(rows, num_codes), torch.randn(rows, num_codes))
    uniform = torch.rand(rows, device=DEVICE)
    settings = {"uncond": uncond, "cfg_scale": 2.0, "temperature": 0.9, **filters}
    codes = ops.draw_codes(logits, uniform, **settings, backend=backend).cpu()
    # Of the distribution that the same kernel filters by: a sum that lies within rounding of top_p may fall either way.
    mass = ops.filter_logits(logits, **settings, backend=backend).cpu().double().exp().cumsum(-1)
    goal = uniform.cpu().double() * mass[:, -1]
    before = mass.gather(1, (codes[:, None] - 1).clamp(min=0))[:, 0].masked_fill(codes == 0, 0)
    passed = mass.gather(1, codes[:, None])[:, 0]
    assert ((before <= goal + 2e-6) & (passed >= goal - 2e-6) & (passed > before)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "length", "dim"),
    [(3, 2, 2, 9, 24), (2, 4, 1, 33, 6), (2, 16, 16, 1025, 64), (24, 16, 16, 257, 64), (70, 16, 4, 300, 128)][
        : None if GPU else 1
    ],
)
def test_decode_attention(rows, heads, kv_heads, length, dim, dtype):
    cache = moved(*torch.randn(2, rows, kv_heads, length, dim), dtype=dtype)
    (rope,) = moved(torch.randn(length, dim // 2, 2))
    exact_cache = [tensor.double().cpu() for tensor in cache]
    first = torch.arange(rows, device=DEVICE) % (length // 2)
    for index in (0, length // 3, length - 1):
        (qkv,) = moved(torch.randn(rows, (heads + 2 * kv_heads) * dim), dtype=dtype)
        for tensor in cache:
            tensor[:, :, index:] = math.nan  # of an older sequence, or never written
        position = torch.tensor([index], device=DEVICE)
        ours = ops.decode_attention(qkv, *cache, position, rope=rope, first=first, backend="triton")
        exact = ops.decode_attention(
            qkv.double().cpu(), *exact_cache, position.cpu(), rope=rope.cpu(), first=first.cpu()
        )
        tolerance = TOLERANCE["decode_attention", dtype]
        assert ((ours.double().cpu() - exact).abs() <= tolerance * (1 + exact.abs())).all()
        for now, then in zip(cache, exact_cache, strict=True):
            stored, wanted = now[:, :, index].double().cpu(), then[:, :, index]
            assert ((stored - wanted).abs() <= tolerance * (1 + wanted.abs())).all()
            assert now[:, :, index + 1 :].isnan().all()
            now.copy_(then)


@pytest.mark.parametrize("index", [-1, 9, 2**40])
def test_a_position_outside_the_cache_is_marked_and_not_written(index):
    cache = moved(*torch.randn(2, 2, 4, 9, 8))
    before = [tensor.clone() for tensor in cache]
    (qkv,) = moved(torch.randn(2, 12 * 8))
    out = ops.decode_attention(qkv, *cache, torch.tensor([index], device=DEVICE), backend="triton")
    assert out.isnan().all()
    assert all(torch.equal(now, then) for now, then in zip(cache, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["LlamaGen", "VAR", "VAR, nothing added", "LayerNorm"])
@pytest.mark.parametrize(
    ("rows", "length", "width"),
    [(3, 1, 96), (2, 5, 33), (128, 1, 1024), (32, 256, 1536), (3, 700, 64), (2, 2, 20_000)][: None if GPU else 1],
)
def test_add_norm(rows, length, width, variant, dtype):
    x, branch = moved(*torch.randn(2, rows, length, width), dtype=dtype)
    gate, weight, bias = moved(torch.randn(rows, 1, 6, width), dtype=dtype)[0].unbind(2)[:3]
    given = {
        "LlamaGen": {"weight": weight[0, 0]},
        "VAR": {"gate": gate, "weight": weight, "bias": bias},
        "VAR, nothing added": {"weight": weight, "bias": bias},
        "LayerNorm": {"weight": weight[0, 0], "bias": bias[0, 0]},
    }[variant]
    settings = {"eps": 1e-5, "rms": variant == "LlamaGen"}
    branch = None if variant == "VAR, nothing added" else branch
    ours = ops.add_norm(x, branch, **given, **settings, backend="triton")
    doubles = {name: tensor.double().cpu() for name, tensor in given.items()}
    branch = None if branch is None else branch.double().cpu()
    exact = ops.add_norm(x.double().cpu(), branch, **doubles, **settings, backend="reference")
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype == dtype
        assert ((one.double().cpu() - other).abs() <= TOLERANCE["add_norm on a GPU", dtype] * (1 + other.abs())).all()


LAYERS = {
    "LlamaGen": ({"eps": 1e-5, "rms": True}, ("weight",)),
    "VAR": ({"eps": 1e-6}, ("gate", "weight", "bias")),
    "VAR, nothing added": ({"eps": 1e-6}, ("weight", "bias")),
    "no norm": ({"eps": None}, ()),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu", "swiglu"])
@pytest.mark.parametrize("variant", LAYERS)
@pytest.mark.parametrize(
    ("width", "outputs"),
    [(96, 40), (33, 6), (1024, 3072), (2816, 1024), (1536, 4608), (3200, 9602), (6144, 130), (1024, 16384)][
        : None if GPU else 1
    ],
)
def test_norm_linear(width, outputs, variant, activation, dtype):
    """One row is the same bits alone, and among eight."""
    settings, names = LAYERS[variant]
    x, branch = moved(*torch.randn(2, 8, 1, width), dtype=dtype)
    branch = None if "no" in variant else branch
    linear, linear_bias = moved(torch.randn(outputs, width) / width**0.5, torch.randn(outputs), dtype=dtype)
    (vectors,) = moved(torch.randn(8, 1, 6, width), dtype=dtype)
    every = dict(zip(("gate", "weight", "bias"), vectors.unbind(2)[:3], strict=True))
    given = {name: every[name] if variant != "LlamaGen" else every[name][0, 0] for name in names}
    settings = {**settings, "activation": activation}
    alone = None
    for rows in (8, 1, 2, 3):
        some = {name: vector if vector.dim() == 1 else vector[:rows] for name, vector in given.items()}
        front = x[:rows], None if branch is None else branch[:rows]
        ours = ops.norm_linear(*front, linear, linear_bias, **some, **settings, backend="triton")
        if alone is None:
            doubles = {name: tensor.double().cpu() for name, tensor in given.items()}
            double = [None if tensor is None else tensor.double().cpu() for tensor in (*front, linear, linear_bias)]
            exact = ops.norm_linear(*double, **doubles, **settings, backend="reference")
            for one, other in zip(ours, exact, strict=True):
                assert one.dtype == dtype
                tolerance = TOLERANCE["norm_linear on a GPU", dtype] * (1 + other.abs())
                assert ((one.double().cpu() - other).abs() <= tolerance).all()
            alone = ours
        elif GPU:  # a product of NumPy's depends on how many rows there are
            assert all(torch.equal(one, other[:rows]) for one, other in zip(ours, alone, strict=True))


@needs_a_gpu
def test_a_launch_that_begins_early_sees_what_was_written_just_before():
    """Weights and rows of a step are written by the kernel in front, of this package or not, in a graph or not."""
    x = torch.zeros(2, 1, 1024, device=DEVICE, dtype=torch.bfloat16)
    first, second = (torch.zeros(1024, 1024, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    new_x, news = moved(torch.randn(2, 1, 1024), torch.randn(2, 1024, 1024) / 32, dtype=x.dtype)

    def step() -> torch.Tensor:
        second.copy_(news[1])
        x.copy_(new_x)
        first.copy_(news[0])
        total, y = ops.norm_linear(x, x, first, eps=1e-5, rms=True, activation="gelu", backend="triton")
        y = ops.add_norm(total, y, eps=1e-5, rms=True, backend="triton")[1]
        y = ops.norm_linear(y, None, second, eps=None, backend="triton")[1]
        x.zero_()
        first.zero_()
        second.zero_()
        return y

    expected = step()
    total, y = ops.norm_linear(new_x, new_x, news[0], eps=1e-5, rms=True, activation="gelu", backend="reference")
    y = ops.add_norm(total, y, eps=1e-5, rms=True, backend="reference")[1] @ news[1].T
    torch.testing.assert_close(expected, y, atol=8e-2, rtol=2e-2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(20):
        assert torch.equal(step(), expected)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "length", "heads", "dim", "start"),
    [(2, 1, 16, 64, 0), (3, 4, 3, 6, 1), (2, 256, 16, 64, 424), (16, 169, 24, 64, 255), (5, 7, 2, 1000, 3)][
        : None if GPU else 1
    ],
)
def test_append_normed(rows, length, heads, dim, start, dtype):
    (qkv,) = moved(torch.randn(rows, length, 3, heads, dim), dtype=dtype)
    cache = moved(*torch.full((2, rows, heads, start + length + 3, dim), math.nan), dtype=dtype)
    exact_cache = [tensor.double().cpu() for tensor in cache]
    (scale,) = moved(1 + torch.rand(heads), dtype=dtype)
    ours = ops.append_normed(qkv, *cache, start, scale=scale, backend="triton")
    exact = ops.append_normed(qkv.double().cpu(), *exact_cache, start, scale=scale.double().cpu())
    for one, other in ((ours, exact), *zip(cache, exact_cache, strict=True)):
        one = one.double().cpu()
        assert torch.equal(one.isnan(), other.isnan())
        tolerance = TOLERANCE["append_normed", dtype] * (1 + other.nan_to_num().abs())
        assert ((one - other).nan_to_num().abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["gelu", "silu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("count", [1023, 1, 2 * 2816, 3_000_001][: None if GPU else 1])
def test_activate(count, gated, kind, dtype):
    x, times = moved(4 * torch.randn(count), torch.randn(count), dtype=dtype)
    ours = ops.activate(x, times if gated else None, kind=kind, backend="triton").double().cpu()
    exact = ops.activate(x.double().cpu(), times.double().cpu() if gated else None, kind=kind)
    assert ((ours - exact).abs() <= TOLERANCE["activate on a GPU", dtype] * (1 + exact.abs())).all()


@pytest.mark.parametrize("shape", [(3, 1, 2816), (2, 5, 1031)][: None if GPU else 1])
def test_activate_of_halves(shape):
    """Of one product, where they lie."""
    (both,) = moved(4 * torch.randn(*shape[:-1], 2 * shape[-1]), dtype=torch.bfloat16)
    x, times = both.chunk(2, dim=-1)
    apart = ops.activate(x.contiguous(), times.contiguous(), kind="silu", backend="triton")
    assert torch.equal(ops.activate(x, times, kind="silu", backend="triton"), apart)


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
    codes = ops.draw_codes(log_probs, torch.zeros(8, device=DEVICE), backend=backend)
    assert (codes == -1).nonzero()[:, 0].tolist() == [1, 2, 3]


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
    uniform = torch.rand(64, device=DEVICE)

    def step() -> torch.Tensor:
        log_probs = ops.filter_logits(logits, top_k=900, backend=backend)
        apart, _ = ops.flow_sample(log_probs, noise, codebook, backend=backend)
        drawn = ops.draw_codes(logits, uniform, top_k=900, backend=backend)
        return torch.stack([ops.sample_codes(logits, noise, codebook, top_k=900, backend=backend)[0], apart, drawn])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles
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
@pytest.mark.parametrize(("rows", "length"), [(2, 1025), (64, 257)])
def test_a_graph_of_one_step_is_right_at_every_position(rows, length):
    """Of a split cache too; the graph counts its positions itself."""
    heads, dim = 16, 64
    cache = moved(*torch.zeros(2, rows, heads, length, dim))
    (qkv, rope) = moved(torch.randn(rows, 3 * heads * dim), torch.randn(length, dim // 2, 2))
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    plain_cache = [tensor.clone() for tensor in cache]

    def step() -> torch.Tensor:
        out = ops.decode_attention(qkv, *cache, position, rope=rope, backend="triton")
        position.add_(1)
        return out

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    position.zero_()
    for index in range(length):
        qkv.copy_(torch.randn_like(qkv))
        graph.replay()
        here = torch.tensor([index], device=DEVICE)
        plain = ops.decode_attention(qkv, *plain_cache, here, rope=rope, backend="reference")
        assert torch.allclose(out, plain, atol=2e-5, rtol=0)


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


@needs_a_gpu
def test_layers_in_a_cuda_graph():
    x, branch = moved(*torch.randn(2, 4, 9, 192), dtype=torch.bfloat16)
    cache = moved(*torch.zeros(2, 4, 2, 20, 32), dtype=torch.bfloat16)

    def step() -> list[torch.Tensor]:
        total, normed = ops.add_norm(x, branch, eps=1e-5, backend="triton")
        query = ops.append_normed(normed.view(4, 9, 3, 2, 32), *cache, 5, backend="triton")
        return [total, query, ops.activate(normed, branch, kind="silu", backend="triton")]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    made += [tensor.clone() for tensor in cache]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(made, [*step(), *cache], strict=True))


@needs_a_gpu
def test_offsets_of_layers_beyond_31_bits():
    """The last of 2.1 G elements are as right as they are alone."""
    last = 3072 * 4
    x = torch.zeros(3072 * 700_000, dtype=torch.float16, device=DEVICE)
    x[-last:].copy_(torch.randn(last))
    assert x.numel() > 2**31
    end = x[-last:].clone()
    ours = ops.activate(x, kind="gelu", backend="triton")[-last:]
    assert torch.equal(ours, ops.activate(end, kind="gelu", backend="triton"))
    for one, other in zip(
        ops.add_norm(x.view(1, -1, 1024), x.view(1, -1, 1024), eps=1e-5, backend="triton"),
        ops.add_norm(end.view(1, -1, 1024), end.view(1, -1, 1024), eps=1e-5, backend="triton"),
        strict=True,
    ):
        assert torch.allclose(one[:, -last // 1024 :], other, atol=2e-3)
    del ours, one, other
    heads, dim = 16, 64
    made = []
    for source in (x, end):
        qkv = source.view(-1, 2, 3, heads, dim)
        cache = [source.new_zeros(len(qkv), heads, 3, dim) for _ in range(2)]
        query = ops.append_normed(qkv, *cache, 1, backend="triton")
        made.append([tensor[-2:].clone() for tensor in (query, *cache)])
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))

"""The kernels on a GPU at the papers' shapes: ours, eager PyTorch, torch.compile and installed peers, side by side.

pytest benchmarks/test_gpu_kernels.py --benchmark-only -s

Times are medians of device events with a cold L2 (triton.testing.do_bench), providers in turn. Floors, each counted
from the shapes: bytes that must move (every input once, every output once), multiply-adds in bf16, TF32 or float32,
and exponentials, at the rates of floors.py; the largest is the floor.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from floors import floors
from shapes import LLAMAGEN, SHAPES, VAR, Shape
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from ddfast import ops
from ddfast.ops import dispatch
from ddfast.ops.activate import activate_reference
from ddfast.ops.add_norm import add_norm_reference
from ddfast.ops.append_normed import append_normed_reference
from ddfast.ops.codebook_posterior import codebook_posterior_reference
from ddfast.ops.decode_attention import decode_attention_reference, rotated
from ddfast.ops.draw_codes import draw_codes_reference
from ddfast.ops.filter_logits import filter_logits_reference
from ddfast.ops.flow_sample import DEFAULT_SOLVER, DEFAULT_STEPS, flow_sample_reference
from ddfast.ops.norm_linear import norm_linear_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OURS = [name for name in ("triton", "cuda") if name in dispatch.available()]
EVALUATIONS = 16
"""What a token needs on average with the early exit (docs/numerics.md)."""

ROUNDS = 3


def record(benchmark: Any, op: str, rows: int, providers: dict[str, Callable[[], Any]], **work: float) -> None:
    """Medians, 20th and 80th percentiles and peak memory of all providers; ours against the others and the floor.

    `work` is what `floors` counts; by it goes what a provider achieves per second.
    """
    from triton.testing import do_bench

    limits = floors(**work)
    floor = max(limits.values())
    measured: dict[str, list[list[float]]] = {name: [] for name in providers}
    peaks = {}
    for name, call in providers.items():
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    for _ in range(ROUNDS):
        for name, call in providers.items():
            measured[name].append(do_bench(call, warmup=10, rep=60, quantiles=[0.5, 0.2, 0.8]))
    table = {}
    for name, quantiles in measured.items():
        median, low, high = (sorted(column)[ROUNDS // 2] for column in zip(*quantiles, strict=True))
        table[name] = {
            "median_ms": median, "p20_ms": low, "p80_ms": high, "peak_bytes": peaks[name],
            "of_floor": 1e3 * floor / median,
            "per_second": {unit.removeprefix("num_"): 1e3 * amount / median for unit, amount in work.items()},
        }  # fmt: skip
    best = min((name for name in OURS if name in table), key=lambda name: table[name]["median_ms"])
    for row in table.values():
        row["ddfast_is_faster_by"] = row["median_ms"] / table[best]["median_ms"]
    benchmark.extra_info.update(
        op=op, rows=rows, providers=table, ddfast=best, floors_ms={name: 1e3 * value for name, value in limits.items()}
    )
    benchmark.pedantic(lambda: (providers[best](), torch.cuda.synchronize()), rounds=5, warmup_rounds=1)
    limit = max(limits, key=lambda name: limits[name])
    print(f"\n{benchmark.name}: floor {1e3 * floor:.4f} ms ({limit})")
    for name, row in sorted(table.items(), key=lambda item: item[1]["median_ms"]):
        rates = ", ".join(f"{rate / 1e12:.2f} T {unit}/s" for unit, rate in row["per_second"].items())
        print(
            f"  {name:26s} {row['median_ms']:9.4f} ms [{row['p20_ms']:.4f}, {row['p80_ms']:.4f}]"
            f" {row['ddfast_is_faster_by']:7.2f}x {100 * row['of_floor']:5.1f} % of floor"
            f" {row['peak_bytes'] / 2**20:9.1f} MiB  {rates}"
        )


def add_peer(providers: dict[str, Callable], name: str, package: str, make: Callable[[], Callable[[], Any]]) -> None:
    """Another library, where it is installed; if it cannot do this shape, that is printed and ours keeps its row."""
    if not importlib.util.find_spec(package):
        return
    try:
        call = make()
        call()
    except Exception as error:  # whatever it raises
        print(f"\n{name} is left out: {error}")
    else:
        providers[name] = call


def compiled(function: Callable) -> Callable:
    return torch.compile(function, mode="max-autotune-no-cudagraphs")


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph, as a decoder replays its step: the host's share is left out of everyone's time."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles
        call()
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def cuda(*tensors: Tensor) -> list[Tensor]:
    return [tensor.cuda() for tensor in tensors]


def eager_sample(logits, noise, codebook, top_k=0, top_p=1.0):
    log_probs = filter_logits_reference(logits, top_k=top_k, top_p=top_p)
    return flow_sample_reference(log_probs, noise, codebook, DEFAULT_STEPS, DEFAULT_SOLVER)


def floor_of_flow(shape: Shape, kept: float) -> dict[str, float]:
    """Of all tokens with so many codes kept: the logits once, and two products and an exponential per evaluation."""
    work = shape.tokens * EVALUATIONS * kept
    return {"num_bytes": 4 * shape.tokens * shape.num_codes, "flop": 4 * work * shape.dim, "exponentials": work}


LARGEST = [LLAMAGEN, Shape(**{**VAR.__dict__, "name": "var-largest-scale", "tokens": 64 * 256})]


@pytest.mark.parametrize("shape", LARGEST, ids=lambda shape: shape.name)
def test_sample_codes(benchmark, shape: Shape):
    """Work as `floor_of_flow` counts it, of the codes that top-k keeps."""
    codebook = shape.codebook()
    logits, noise, codebook = cuda(shape.logits(codebook), shape.noise(), codebook)
    kept = shape.filters["top_k"]
    fast = compiled(eager_sample)
    theirs = eager_sample(logits, noise, codebook, **shape.filters)
    for name in OURS:
        codes, _ = ops.sample_codes(logits, noise, codebook, **shape.filters, backend=name)
        assert (codes == theirs).double().mean() > 0.97
    providers = {
        name: lambda name=name: ops.sample_codes(logits, noise, codebook, **shape.filters, backend=name)
        for name in OURS
    }
    providers["eager"] = lambda: eager_sample(logits, noise, codebook, **shape.filters)
    providers["torch.compile"] = lambda: fast(logits, noise, codebook, **shape.filters)
    record(benchmark, "sample_codes", shape.tokens, providers, **floor_of_flow(shape, kept))


@pytest.mark.parametrize("shape", LARGEST, ids=lambda shape: shape.name)
def test_flow_sample(benchmark, shape: Shape):
    """Work as `floor_of_flow` counts it, of the codes that these rows keep."""
    codebook = shape.codebook()
    logits, noise, codebook = cuda(shape.logits(codebook), shape.noise(), codebook)
    log_probs = filter_logits_reference(logits, **shape.filters)
    kept = float((log_probs > -torch.inf).sum()) / shape.tokens

    def eager():
        return flow_sample_reference(log_probs, noise, codebook, DEFAULT_STEPS, DEFAULT_SOLVER)

    providers = {name: lambda name=name: ops.flow_sample(log_probs, noise, codebook, backend=name) for name in OURS} | {
        "eager": eager,
        "torch.compile": compiled(eager),
    }
    record(benchmark, "flow_sample", shape.tokens, providers, **floor_of_flow(shape, kept))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_filter_logits(benchmark, shape: Shape):
    """Bytes: every float32 logit in, every log-probability out."""
    (logits,) = cuda(shape.logits(shape.codebook()))
    providers: dict[str, Callable] = {
        name: lambda name=name: ops.filter_logits(logits, **shape.filters, backend=name)
        for name in OURS
        if name in dispatch.KERNELS["filter_logits"]
    }
    providers["eager"] = lambda: filter_logits_reference(logits, **shape.filters)

    def flashinfer():
        from flashinfer import sampling

        return lambda: sampling.top_k_mask_logits(logits, int(shape.filters["top_k"]))

    add_peer(providers, "flashinfer top-k mask", "flashinfer", flashinfer)
    record(benchmark, "filter_logits", shape.tokens, providers, num_bytes=8 * logits.numel())


@pytest.mark.parametrize("rows", [1, 64, 128])
def test_draw_codes(benchmark, rows):
    """A step of LlamaGen's ordinary sampling; the logits are read once."""
    shape = Shape(**{**LLAMAGEN.__dict__, "tokens": rows})
    (logits,) = cuda(shape.logits(shape.codebook()))
    uniform = torch.rand(rows, device="cuda")
    theirs = draw_codes_reference(filter_logits_reference(logits, **shape.filters), uniform)
    providers: dict[str, Callable] = {
        name: lambda name=name: ops.draw_codes(logits, uniform, **shape.filters, backend=name)
        for name in OURS
        if name in dispatch.KERNELS["draw_codes"]
    }
    for draw in providers.values():
        assert (draw() == theirs).double().mean() > 0.97

    def eager():
        return torch.multinomial(filter_logits_reference(logits, **shape.filters).exp(), 1)

    providers |= {"eager": eager, "torch.compile": compiled(eager)}

    def flashinfer():
        from flashinfer import sampling

        return lambda: sampling.top_k_top_p_sampling_from_logits(logits, int(shape.filters["top_k"]), 1.0)

    add_peer(providers, "flashinfer", "flashinfer", flashinfer)
    record(benchmark, "draw_codes", rows, providers, num_bytes=4 * logits.numel() + 12 * rows)


@pytest.mark.parametrize("position", [255, 1023])
@pytest.mark.parametrize("rows", [2, 128, 256])
@torch.inference_mode()
def test_decode_attention(benchmark, rows, position):
    """A layer of LlamaGen-L at the end of 256 or 1024 codes after the class, in bf16, every provider as a CUDA graph.

    Bytes: keys and values of all positions before, 4 KiB each per row, and once the new query, key, value and result.
    Operations: two products of 64 multiply-adds per head and position seen.
    """
    heads, dim, length = 16, 64, position + 2
    generator = torch.Generator("cuda").manual_seed(0)
    cache = torch.randn(2, rows, heads, length, dim, generator=generator, device="cuda").bfloat16()
    keys, values = cache
    qkv = torch.randn(rows, 3 * heads * dim, generator=generator, device="cuda").bfloat16()
    angle = 6 * torch.rand(length, dim // 2, generator=generator, device="cuda")
    rope = torch.stack((angle.cos(), angle.sin()), dim=-1)
    here = torch.tensor([position], device="cuda")
    arguments = (qkv, keys, values, here, rope, None, dim**-0.5)

    def sdpa():
        query, key, value = qkv.view(rows, 3, heads, 1, dim).unbind(1)
        query, key = (rotated(x.float(), rope[here]).bfloat16() for x in (query, key))
        keys.index_copy_(2, here, key)
        values.index_copy_(2, here, value)
        return F.scaled_dot_product_attention(query, keys[:, :, : position + 1], values[:, :, : position + 1])

    fast = compiled(decode_attention_reference)
    providers: dict[str, Callable] = {
        name: lambda name=name: ops.decode_attention(qkv, keys, values, here, rope=rope, backend=name)
        for name in OURS
        if name in dispatch.KERNELS["decode_attention"]
    }
    providers |= {
        "eager": lambda: decode_attention_reference(*arguments),
        "rope, index_copy_, SDPA": sdpa,
        "torch.compile": lambda: fast(*arguments),
    }

    def flash_attn():
        from flash_attn import flash_attn_with_kvcache

        others = [tensor.transpose(1, 2).contiguous() for tensor in cache]
        held = here.int().expand(rows).contiguous()
        new = qkv.view(rows, 1, 3, heads, dim).unbind(2)
        cosine, sine = rope.bfloat16().unbind(-1)
        angles = {"rotary_cos": cosine.contiguous(), "rotary_sin": sine.contiguous(), "rotary_interleaved": True}
        return lambda: flash_attn_with_kvcache(new[0], *others, k=new[1], v=new[2], cache_seqlens=held, **angles)

    add_peer(providers, "flash_attn_with_kvcache", "flash_attn", flash_attn)
    expected = decode_attention_reference(*arguments)
    for name, call in providers.items():
        assert (call().reshape(rows, -1) - expected).abs().max() < 2e-2, name
    pieces = rows * heads
    moved = 2 * dim * pieces * (2 * position + 3 + 1 + 2)
    work = {"flop": 4 * dim * pieces * (position + 1), "exponentials": pieces * (position + 1)}
    graphs = {name: graphed(call) for name, call in providers.items()}
    record(benchmark, "decode_attention", rows, graphs, num_bytes=moved, **work)


def record_layer(
    benchmark: Any, op: str, rows: int, call: Callable[[str], Any], reference: Callable[[], Any], num_bytes: float
) -> None:
    """One of the fused layers, `call(backend)`, every provider as a CUDA graph."""
    providers: dict[str, Callable] = {name: partial(call, name) for name in OURS if name in dispatch.KERNELS[op]}
    torch.compiler.reset()  # or a second shape would be compiled as a variable one
    providers |= {"eager": reference, "torch.compile": compiled(reference)}
    expected = reference()
    for name, provider in providers.items():
        torch.testing.assert_close(provider(), expected, atol=5e-2, rtol=2e-2, msg=lambda text, name=name: name + text)
    graphs = {name: graphed(provider) for name, provider in providers.items()}
    record(benchmark, op, rows, graphs, num_bytes=num_bytes)


STEPS = [("llamagen", 2, 1), ("llamagen", 128, 1), ("var", 128, 256)]
"""A step of LlamaGen-L, and the last scale of VAR-d16, for 1 and 64 guided images; 1024 wide, 16 heads of 64, bf16."""


@pytest.mark.parametrize(("family", "rows", "length"), STEPS)
@torch.inference_mode()
def test_add_norm(benchmark, family, rows, length):
    """Bytes: two tensors in, two out, and the vectors."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, branch = torch.randn(2, rows, length, 1024, generator=generator, device="cuda").bfloat16()
    vectors = 1 + torch.randn(rows, 1, 6, 1024, generator=generator, device="cuda").bfloat16() / 8
    gate, weight, bias = vectors.unbind(2)[:3] if family == "var" else (None, vectors[0, 0, 0], None)
    rms = family == "llamagen"

    def ours(backend):
        return ops.add_norm(x, branch, gate=gate, weight=weight, bias=bias, eps=1e-5, rms=rms, backend=backend)

    def reference():
        return add_norm_reference(x, branch, gate, weight, bias, 1e-5, rms)

    moved = 2 * (4 * x.numel() + 1024 * (1 if rms else 3 * rows))
    record_layer(benchmark, "add_norm", rows * length, ours, reference, moved)


LLAMAGEN_L = {
    "wqkv": (1024, 3072, "rms", "none"), "wo": (1024, 1024, "none", "none"), "w1, w3": (1024, 2816, "rms", "swiglu"),
    "w2": (2816, 1024, "none", "none"), "output": (1024, 16384, "none", "none"),
}  # fmt: skip
"""Width, outputs, norm in front and activation behind of its linear layers."""


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("layer", LLAMAGEN_L)
@torch.inference_mode()
def test_norm_linear(benchmark, layer, rows):
    """LlamaGen-L, a step of few rows in bf16. Bytes: the matrix; tensors of the rows are nothing beside it."""
    width, outputs, norm, activation = LLAMAGEN_L[layer]
    generator = torch.Generator("cuda").manual_seed(0)
    x, branch = torch.randn(2, rows, 1, width, generator=generator, device="cuda").bfloat16()
    matrices = 2 if activation == "swiglu" else 1
    linear = torch.randn(matrices * outputs, width, generator=generator, device="cuda").bfloat16() / width**0.5
    front = {"weight": torch.ones_like(x[0, 0]), "eps": 1e-5, "rms": True} if norm == "rms" else {"eps": None}
    branch = branch if norm == "rms" else None

    def ours(backend):
        return ops.norm_linear(x, branch, linear, **front, activation=activation, backend=backend)

    weight, eps = front.get("weight"), front["eps"] or 0.0
    reference = partial(
        norm_linear_reference, x, branch, linear, None, None, weight, None, eps, norm, activation
    )  # fmt: skip
    record_layer(benchmark, "norm_linear", rows, ours, reference, 2 * linear.numel())


@pytest.mark.parametrize(("family", "rows", "length"), STEPS)
@torch.inference_mode()
def test_activate(benchmark, family, rows, length):
    """SwiGLU over the halves of 2 x 2816, or GELU over 4096. Bytes: every element in and out."""
    generator = torch.Generator("cuda").manual_seed(0)
    kind, width = ("silu", 2 * 2816) if family == "llamagen" else ("gelu", 4096)
    x = torch.randn(rows, length, width, generator=generator, device="cuda").bfloat16()
    x, times = x.chunk(2, dim=-1) if kind == "silu" else (x, None)

    def ours(backend):
        return ops.activate(x, times, kind=kind, backend=backend)

    tensors = 2 if times is None else 3
    reference = partial(activate_reference, x, times, kind)
    record_layer(benchmark, "activate", rows * length, ours, reference, 2 * tensors * x.numel())


@pytest.mark.parametrize(("rows", "length"), [(2, 1), (128, 1), (128, 256)])
@torch.inference_mode()
def test_append_normed(benchmark, rows, length):
    """VAR-d16's first and last scale. Bytes: query, key and value in and out."""
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(rows, length, 3, 16, 64, generator=generator, device="cuda").bfloat16()
    keys, values = (torch.zeros(rows, 16, 680, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    scale = 1 + torch.rand(16, generator=generator, device="cuda").bfloat16()
    start = 680 - length

    def ours(backend):
        return ops.append_normed(qkv, keys, values, start, scale=scale, backend=backend)

    reference = partial(append_normed_reference, qkv, keys, values, start, scale)
    # As the op counts its rows: a query, a key or a value each.
    record_layer(benchmark, "append_normed", 3 * 16 * rows * length, ours, reference, 2 * 2 * qkv.numel())


def flex_posterior(t: Tensor, log_probs: Tensor, codebook: Tensor, attention: Callable) -> Callable:
    """The posterior's mean as attention of x over the codes, with what is left of the exponent as a bias."""
    ratio = (1 - t) / t
    half_norm = codebook.square().sum(-1) / 2
    dim = codebook.shape[1]
    codes = F.pad(codebook, (0, max(0, 16 - dim)))[None, None]  # 16 is the least that FlexAttention takes

    def bias(score, batch, head, row, code):
        return score + log_probs[row, code].float() - half_norm[code] * ratio[row] ** 2

    def posterior(x: Tensor, *_: Tensor) -> Tensor:
        query = F.pad(x * (ratio / t)[:, None], (0, max(0, 16 - dim)))[None, None]
        return attention(query, codes, codes, score_mod=bias, scale=1.0)[0, 0, :, :dim]

    return posterior


@pytest.mark.parametrize(
    ("rows", "num_codes", "dim"), [(32 * 680, 4096, 32), (128 * 256, 16384, 8)], ids=["var", "llamagen"]
)
def test_codebook_posterior(benchmark, rows, num_codes, dim):
    """Training shapes, forward and backward; log-probabilities in bf16, as a teacher under autocast gives them.

    Bytes: the log-probabilities, twice. Operations: 2 products of d multiply-adds per row and code forward, 3 backward,
    each as three of tf32. An exponential per row and code, twice.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    log_probs = torch.randn(rows, num_codes, generator=generator, device="cuda").bfloat16()
    codebook = torch.randn(num_codes, dim, generator=generator, device="cuda")
    t = torch.linspace(0.02, 0.98, rows, device="cuda")
    x = torch.randn(rows, dim, generator=generator, device="cuda").requires_grad_()
    upstream = torch.randn_like(x)

    def with_gradient(posterior):
        return torch.autograd.grad(posterior(x, t, log_probs, codebook), x, upstream)[0]

    def reference(*arguments):
        return codebook_posterior_reference(*arguments)[0]

    fast = compiled(reference)
    providers = {
        name: lambda name=name: with_gradient(lambda *arguments: ops.codebook_posterior(*arguments, backend=name))
        for name in OURS
    }
    providers |= {"eager": lambda: with_gradient(reference), "torch.compile": lambda: with_gradient(fast)}

    def flex():
        posterior = flex_posterior(t, log_probs, codebook, torch.compile(flex_attention))
        ours, theirs = (call() for call in (providers["eager"], lambda: with_gradient(posterior)))
        assert (ours - theirs).norm() < 0.05 * ours.norm()
        return lambda: with_gradient(posterior)

    add_peer(providers, "FlexAttention", "torch", flex)
    work = rows * num_codes
    record(
        benchmark,
        "codebook_posterior",
        rows,
        providers,
        num_bytes=2 * 2 * work,
        tf32=3 * 10 * work * dim,
        exponentials=2 * work,
    )


@pytest.mark.parametrize(("num_codes", "dim"), [(16384, 8), (4096, 32)])
@torch.inference_mode()
def test_nearest_code(benchmark, num_codes, dim):
    """Bytes: every vector in, every index out. Operations: d multiply-adds per row and code in bf16, which tells the
    codes that can be nearest, and a comparison, which takes the place of a float32 multiply-add.
    """
    rows = 65536
    x, codebook = cuda(torch.randn(rows, dim), torch.randn(num_codes, dim))
    fast = compiled(lambda x, codebook: torch.cdist(x, codebook).argmin(-1))
    providers = {name: lambda name=name: ops.nearest_code(x, codebook, backend=name) for name in OURS}
    providers["torch.cdist().argmin()"] = lambda: torch.cdist(x, codebook).argmin(-1)
    providers["torch.compile"] = lambda: fast(x, codebook)

    def vector_quantize():
        from vector_quantize_pytorch import VectorQuantize

        quantizer = VectorQuantize(dim=dim, codebook_size=num_codes).cuda().eval()
        quantizer._codebook.embed.data.copy_(codebook[None])
        quantizer._codebook.initted.data.fill_(True)
        return lambda: quantizer(x[None])[1][0]

    def flash_kmeans():
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton

        return lambda: euclid_assign_triton(x[None], codebook[None], x.square().sum(-1)[None])

    def keops():
        from pykeops.torch import LazyTensor

        return lambda: ((LazyTensor(x[:, None]) - LazyTensor(codebook[None])) ** 2).sum(-1).argmin(1)

    add_peer(providers, "vector-quantize-pytorch", "vector_quantize_pytorch", vector_quantize)
    add_peer(providers, "flash-kmeans", "flash_kmeans", flash_kmeans)
    add_peer(providers, "KeOps", "pykeops", keops)
    pairs = rows * num_codes
    record(
        benchmark,
        "nearest_code",
        rows,
        providers,
        num_bytes=4 * x.numel() + 8 * rows,
        bf16=2 * pairs * dim,
        flop=2 * pairs,
    )

"""The kernels on a GPU at the papers' shapes: ours, eager PyTorch, torch.compile and installed peers, side by side.

pytest benchmarks/test_gpu_kernels.py --benchmark-only -s

Times are medians of device events with a cold L2 (triton.testing.do_bench), providers in turn. Floors, each counted
from the shapes: bytes that must move (every input once, every output once) at BANDWIDTH, multiply-adds at TF32 or
FP32, exponentials at SFU; the largest is the floor. The rates are an H200's: 4.3e12 bytes/s was measured on one
(copies), the others are its data sheet's or follow from it: 132 multiprocessors at 1.98 GHz with 16 exponentials and
128 float32 multiply-adds per clock each.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes import LLAMAGEN, SHAPES, VAR, Shape
from torch import Tensor

from ddfast import ops
from ddfast.ops import dispatch
from ddfast.ops.codebook_posterior import codebook_posterior_reference
from ddfast.ops.filter_logits import filter_logits_reference
from ddfast.ops.flow_sample import DEFAULT_SOLVER, DEFAULT_STEPS, flow_sample_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OURS = [name for name in ("triton", "cuda") if name in dispatch.available()]
BANDWIDTH, TF32, FP32, SFU = 4.3e12, 495e12, 67e12, 4.2e12
EVALUATIONS = 16
"""What a token needs on average with the early exit (docs/numerics.md)."""

ROUNDS = 3


def record(
    benchmark: Any, op: str, rows: int, providers: dict[str, Callable[[], Any]], *, num_bytes: float = 0,
    flop: float = 0, tf32: float = 0, exponentials: float = 0,
) -> None:  # fmt: skip
    """Medians, 20th and 80th percentiles and peak memory of all providers; ours against the others and the floor."""
    from triton.testing import do_bench

    floors = {"bytes": num_bytes / BANDWIDTH, "flop": flop / FP32, "tf32": tf32 / TF32, "exp": exponentials / SFU}
    floor = max(floors.values())
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
        }  # fmt: skip
    best = min(OURS, key=lambda name: table[name]["median_ms"])
    for row in table.values():
        row["ddfast_is_faster_by"] = row["median_ms"] / table[best]["median_ms"]
    benchmark.extra_info.update(
        op=op, rows=rows, providers=table, ddfast=best, floors_ms={name: 1e3 * value for name, value in floors.items()}
    )
    benchmark.pedantic(lambda: (providers[best](), torch.cuda.synchronize()), rounds=5, warmup_rounds=1)
    limit = max(floors, key=lambda name: floors[name])
    print(f"\n{benchmark.name}: floor {1e3 * floor:.4f} ms ({limit})")
    for name, row in sorted(table.items(), key=lambda item: item[1]["median_ms"]):
        print(
            f"  {name:26s} {row['median_ms']:9.4f} ms [{row['p20_ms']:.4f}, {row['p80_ms']:.4f}]"
            f" {row['ddfast_is_faster_by']:7.2f}x {100 * row['of_floor']:5.1f} % of floor"
            f" {row['peak_bytes'] / 2**20:9.1f} MiB"
        )


def compiled(function: Callable) -> Callable:
    return torch.compile(function, mode="max-autotune-no-cudagraphs")


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
    (logits,) = cuda(shape.logits(shape.codebook()))
    providers: dict[str, Callable] = {
        name: lambda name=name: ops.filter_logits(logits, **shape.filters, backend=name)
        for name in OURS
        if name in dispatch.KERNELS["filter_logits"]
    }
    providers["eager"] = lambda: filter_logits_reference(logits, **shape.filters)
    if importlib.util.find_spec("flashinfer"):
        from flashinfer import sampling

        providers["flashinfer top-k mask"] = lambda: sampling.top_k_mask_logits(logits, int(shape.filters["top_k"]))
    record(benchmark, "filter_logits", shape.tokens, providers, num_bytes=8 * logits.numel())


@pytest.mark.parametrize(
    ("rows", "num_codes", "dim"), [(32 * 680, 4096, 32), (128 * 256, 16384, 8)], ids=["var", "llamagen"]
)
def test_codebook_posterior(benchmark, rows, num_codes, dim):
    """Training shapes, forward and backward; log-probabilities in bf16, as a teacher under autocast gives them."""
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
    work = rows * num_codes
    # Two products forward, three backward, each as three of tf32.
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
    rows = 65536
    x, codebook = cuda(torch.randn(rows, dim), torch.randn(num_codes, dim))
    fast = compiled(lambda x, codebook: torch.cdist(x, codebook).argmin(-1))
    providers = {name: lambda name=name: ops.nearest_code(x, codebook, backend=name) for name in OURS}
    providers["torch.cdist().argmin()"] = lambda: torch.cdist(x, codebook).argmin(-1)
    providers["torch.compile"] = lambda: fast(x, codebook)
    if importlib.util.find_spec("vector_quantize_pytorch"):
        from vector_quantize_pytorch import VectorQuantize

        quantizer = VectorQuantize(dim=dim, codebook_size=num_codes).cuda().eval()
        quantizer._codebook.embed.data.copy_(codebook[None])
        quantizer._codebook.initted.data.fill_(True)
        providers["vector-quantize-pytorch"] = lambda: quantizer(x[None])[1][0]
    work = 2 * rows * num_codes * dim
    record(benchmark, "nearest_code", rows, providers, num_bytes=4 * x.numel() + 8 * rows, tf32=3 * work)

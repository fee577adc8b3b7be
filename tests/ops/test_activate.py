import numpy as np
import pytest
import torch
from truth import TOLERANCE

from ddfast.ops import activate
from ddfast.ops.activate import _rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def expected(x: np.ndarray, times: np.ndarray | None, kind: str) -> np.ndarray:
    """In float64 NumPy."""
    with np.errstate(over="ignore"):
        if kind == "gelu":
            y = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        else:
            y = x / (1 + np.exp(-x))
    return y if times is None else y * times


@pytest.mark.filterwarnings("ignore:overflow encountered")  # an exponential of Triton's interpreter, as meant
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gelu", "silu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7, 33), (3, 5, 1000), (2, 4099)])
def test_is_the_function(backend, dtype, kind, gated, shape):
    generator = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(*shape, generator=generator)).to(dtype)
    if x.numel() > 10:
        x.view(-1)[:6] = torch.tensor([0.0, 40.0, -40.0, 200.0, -200.0, 1e-6])
    times = torch.randn(*shape, generator=generator).to(dtype) if gated else None
    wanted = expected(x.double().numpy(), None if times is None else times.double().numpy(), kind)
    out = activate(x, times, kind=kind, backend=backend)
    assert out.dtype == dtype
    assert (np.abs(out.double().numpy() - wanted) <= TOLERANCE["activate", dtype] * np.maximum(1, np.abs(wanted))).all()


def test_strides_and_empty(backend):
    x = torch.randn(40, 300)
    plain = activate(x, x, kind="silu", backend=backend)
    assert torch.equal(activate(x.T, x.T, kind="silu", backend=backend), plain.T)
    for first, second, wanted in (
        (x.T, x.T.contiguous(), plain.T),
        (x[:, ::2], x[:, ::2], plain[:, ::2]),
        (x[:1].expand(3, -1), x[:1].repeat(3, 1), plain[:1].expand(3, -1)),
    ):  # PyTorch's own functions round by layout
        assert (activate(first, second, kind="silu", backend=backend) - wanted).abs().max() < 1e-5
    assert activate(torch.empty(0, 4), kind="gelu", backend=backend).shape == (0, 4)
    assert activate(torch.tensor(1.0), kind="gelu", backend=backend).shape == ()


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 1), (7, 1, 257), (3, 5, 1031), (2, 3, 2816)])
def test_halves_of_one_product_are_not_copied(backend, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    both = (4 * torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)).to(dtype)
    x, times = both.chunk(2, dim=-1)
    wanted = activate(x.contiguous(), times.contiguous(), kind="silu", backend=backend)
    for half, rows in zip((x, times), _rows(x, times), strict=True):
        assert rows is not None and rows.data_ptr() == half.data_ptr()
    out = activate(x, times, kind="silu", backend=backend)
    assert out.stride() == wanted.stride()
    assert (out - wanted).abs().max() <= (1e-5 if backend == "reference" and dtype == torch.float32 else 0)


@pytest.mark.parametrize("kind", ["gelu", "silu"])
def test_gradients_are_pytorchs(kind):
    x, times = torch.randn(100, 100, requires_grad=True), torch.randn(100, 100, requires_grad=True)
    plain = torch.nn.functional.gelu(x, approximate="tanh") if kind == "gelu" else torch.nn.functional.silu(x)
    for ours, theirs in zip(
        torch.autograd.grad(activate(x, times, kind=kind).sum(), (x, times)),
        torch.autograd.grad((plain * times).sum(), (x, times)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"kind": "relu"}, ValueError, "kind: got 'relu'"),
        ({"times": torch.zeros(4, 3)}, ValueError, "times: got shape"),
        ({"times": torch.zeros(3, 4).half()}, TypeError, "times: got torch.float16"),
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "x: got dtype torch.int64"),
    ],
)
@pytest.mark.parametrize("gradient", [False, True])
def test_errors(arguments, error, words, gradient):
    if gradient and arguments.get("x", torch.zeros(1)).is_floating_point():
        arguments = {"x": torch.zeros(3, 4, requires_grad=True), **arguments}
    with pytest.raises(error, match=words):
        activate(**{"x": torch.zeros(3, 4), "kind": "gelu", **arguments})

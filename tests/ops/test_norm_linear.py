import numpy as np
import pytest
import torch
from test_activate import expected as activated
from test_add_norm import expected as normed
from truth import TOLERANCE

from ddfast import env
from ddfast.ops import activate, add_norm, norm_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FRONTS = {
    "nothing": {"eps": None},
    "LlamaGen": {"eps": 1e-5, "rms": True},
    "VAR": {"eps": 1e-6},
    "LayerNorm": {"eps": 1e-5},
    "VAR, nothing added": {"eps": 1e-6},
}


def problem(front, dtype, rows, length, width, outputs):
    """Arguments before the settings, and the vectors, by name."""
    generator = torch.Generator().manual_seed(width)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x, branch = normal(2, rows, length, width).to(dtype)
    linear, linear_bias = (normal(outputs, width) / width**0.5).to(dtype), normal(outputs).to(dtype)
    gate, weight, bias = normal(rows, 1, 6, width).to(dtype).unbind(2)[:3]  # three of six, not contiguous
    vectors = {
        "nothing": {},
        "LlamaGen": {"weight": weight[0, 0]},
        "VAR": {"gate": gate, "weight": weight, "bias": bias},
        "LayerNorm": {"weight": weight[0, 0], "bias": bias[0, 0]},
        "VAR, nothing added": {"weight": weight, "bias": bias},
    }[front]
    nothing_added = front in ("nothing", "VAR, nothing added")
    return (x, None if nothing_added else branch, linear, linear_bias), vectors


def truth(arguments, vectors, activation, eps, rms=False):
    """In float64 NumPy."""
    x, branch, linear, linear_bias = (None if t is None else t.double().numpy() for t in arguments)
    vectors = [vectors[name].double().numpy() if name in vectors else None for name in ("gate", "weight", "bias")]
    total, y = (x, x) if eps is None else normed(x, branch, *vectors, eps, rms)
    y = y @ linear.T + linear_bias
    if activation == "gelu":
        y = activated(y, None, "gelu")
    elif activation == "swiglu":
        half = y.shape[-1] // 2
        y = activated(y[..., :half], y[..., half:], "silu")
    return total, y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "length", "width", "outputs"),
    [(2, 1, 96, 40), (1, 1, 33, 6), (2, 4, 300, 18), (8, 1, 1, 2), (3, 1, 600, 10)],
)
@pytest.mark.parametrize("activation", ["none", "gelu", "swiglu"])
@pytest.mark.parametrize("front", FRONTS)
def test_is_norm_product_and_activation(backend, front, activation, rows, length, width, outputs, dtype):
    arguments, vectors = problem(front, dtype, rows, length, width, outputs)
    made = norm_linear(*arguments, **vectors, **FRONTS[front], activation=activation, backend=backend)
    for ours, theirs in zip(made, truth(arguments, vectors, activation, **FRONTS[front]), strict=True):
        assert ours.dtype == dtype
        assert ours.shape == theirs.shape
        tolerance = TOLERANCE["norm_linear", dtype] * max(1, np.abs(theirs).max())
        assert np.abs(ours.double().numpy() - theirs).max() < tolerance
    assert (made[0] is arguments[0]) == (arguments[1] is None)


@pytest.mark.parametrize("activation", ["none", "gelu", "swiglu"])
@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("rows", [2, 40])
def test_auto_is_the_three_functions_bit_for_bit(front, activation, rows):
    (x, branch, linear, linear_bias), vectors = problem(front, torch.float32, rows, 1, 64, 48)
    settings = FRONTS[front]
    total, y = norm_linear(x, branch, linear, linear_bias, **vectors, **settings, activation=activation)
    expected = x, x
    if settings["eps"] is not None:
        expected = add_norm(x, branch, **vectors, **settings)
    product = torch.nn.functional.linear(expected[1], linear, linear_bias)
    if activation != "none":
        halves = product.chunk(2, dim=-1) if activation == "swiglu" else (product,)
        product = activate(*halves, kind="silu" if activation == "swiglu" else "gelu")
    assert torch.equal(total, expected[0])
    assert torch.equal(y, product)


def test_gradients_are_pytorchs():
    (x, branch, linear, linear_bias), vectors = problem("LayerNorm", torch.float32, 2, 1, 8, 6)
    leaves = [tensor.requires_grad_() for tensor in (x, branch, linear, linear_bias, *vectors.values())]
    total, y = norm_linear(x, branch, linear, linear_bias, **vectors, eps=1e-5)
    plain = torch.nn.functional.layer_norm(x + branch, (8,), **vectors, eps=1e-5) @ linear.T + linear_bias
    sums = [z.square().sum() + total.sum() for z in (y, plain)]
    ours, theirs = (torch.autograd.grad(z, leaves, retain_graph=True) for z in sums)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_strides(backend):
    """Of a cut matrix, a gathered row and vectors of one feature after another."""
    (x, branch, linear, _), vectors = problem("VAR", torch.float32, 2, 3, 40, 12)
    plain = norm_linear(x, branch, linear, **vectors, eps=1e-5, backend=backend)
    apart = {name: vector.transpose(0, -1).contiguous().transpose(0, -1) for name, vector in vectors.items()}
    wide = torch.randn(12, 50)
    wide[:, 5:45] = linear
    x, branch = (tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (x, branch))
    made = norm_linear(x, branch, wide[:, 5:45], **apart, eps=1e-5, backend=backend)
    for one, other in zip(made, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_empty(backend):
    for rows, outputs in ((0, 4), (2, 0)):
        x = torch.empty(rows, 1, 8)
        total, y = norm_linear(x, x, torch.empty(outputs, 8), eps=1e-5, backend=backend)
        assert total.shape == x.shape
        assert y.shape == (rows, 1, outputs)


@pytest.mark.skipif(not env.triton_interpreted(), reason="needs Triton's interpreter")
def test_a_kernel_refuses_many_rows():
    with pytest.raises(ValueError, match="x: got 9 positions, expected at most 8 for backend 'triton'"):
        norm_linear(torch.zeros(3, 3, 8), None, torch.zeros(4, 8), eps=1e-5, backend="triton")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": torch.zeros(3, 8)}, "x: got shape"),
        ({"branch": torch.zeros(2, 3, 7)}, "branch: got shape"),
        ({"branch": torch.zeros(2, 3, 8).half()}, "branch: got torch.float16"),
        ({"linear": torch.zeros(4, 7)}, r"linear: got shape \(4, 7\), expected \[O, 8\]"),
        ({"linear": torch.zeros(5, 8), "activation": "swiglu"}, r"linear: got shape \(5, 8\), expected \[2 O, 8\]"),
        ({"linear": torch.zeros(4, 8).half()}, "linear: got torch.float16"),
        ({"linear_bias": torch.zeros(5)}, "linear_bias: got shape"),
        ({"linear_bias": torch.zeros(4).half()}, "linear_bias: got torch.float16"),
        ({"eps": None}, "branch: got a tensor, expected None where eps is None"),
        ({"eps": None, "branch": None, "weight": torch.zeros(8)}, "weight: got a tensor"),
        ({"eps": -1.0}, "eps: got -1.0"),
        ({"activation": "relu"}, "activation: got 'relu'"),
    ],
)
def test_errors(arguments, words):
    given = {"x": torch.zeros(2, 3, 8), "branch": torch.zeros(2, 3, 8), "linear": torch.zeros(4, 8), "eps": 1e-5}
    given |= arguments
    with torch.no_grad(), pytest.raises(ValueError, match=words):
        norm_linear(given.pop("x"), given.pop("branch"), given.pop("linear"), **given, backend="reference")

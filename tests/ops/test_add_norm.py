import numpy as np
import pytest
import torch
from truth import TOLERANCE

from ddfast.ops import add_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def expected(x, branch, gate, weight, bias, eps, rms):
    """In float64 NumPy."""
    total = x if branch is None else x + branch * (1 if gate is None else gate)
    centred = total - (0 if rms else total.mean(-1, keepdims=True))
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return total, normed * (1 if weight is None else weight) + (0 if bias is None else bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "length", "width"), [(3, 1, 96), (2, 5, 64), (1, 3, 1000), (4, 2, 1)])
@pytest.mark.parametrize("variant", ["bare", "LlamaGen", "VAR", "LayerNorm", "VAR, nothing added", "gate only"])
def test_is_residual_and_norm(backend, dtype, rows, length, width, variant):
    generator = torch.Generator().manual_seed(width)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    x, branch, vector = normal(rows, length, width), normal(rows, length, width), normal(width)
    class_rows = normal(rows, 1, 6, width)  # as VAR has them: three of six, not contiguous
    gate, weight, bias = class_rows.unbind(2)[:3]
    given = {
        "bare": (None, None, None, None),
        "LlamaGen": (branch, None, vector, None),
        "VAR": (branch, gate, weight, bias),
        "LayerNorm": (branch, None, vector, normal(width)),
        "VAR, nothing added": (None, None, weight, bias),
        "gate only": (branch, normal(width), None, None),
    }[variant]
    rms = variant == "LlamaGen"
    arrays = [None if tensor is None else tensor.double().numpy() for tensor in (x, *given)]
    wanted = expected(*arrays, 1e-5, rms)
    names = ("gate", "weight", "bias")
    made = add_norm(x, given[0], **dict(zip(names, given[1:], strict=True)), eps=1e-5, rms=rms, backend=backend)
    for ours, theirs in zip(made, wanted, strict=True):
        assert ours.dtype == dtype
        tolerance = TOLERANCE["add_norm", dtype] * max(1, np.abs(theirs).max())
        assert np.abs(ours.double().numpy() - theirs).max() < tolerance
    assert (made[0] is x) == (given[0] is None)


def test_gradients_are_pytorchs():
    x, branch, weight = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(3))
    weight = weight[0, 0]
    total, normed = add_norm(x, branch, weight=weight, eps=1e-5)
    plain = torch.nn.functional.layer_norm(x + branch, (8,), weight, eps=1e-5)
    ours, theirs = (
        torch.autograd.grad((y.square().sum() + total.sum()), (x, branch, weight), retain_graph=True)
        for y in (normed, plain)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_empty():
    total, normed = add_norm(torch.empty(0, 3, 8), torch.empty(0, 3, 8), eps=1e-5, backend="reference")
    assert total.shape == normed.shape == (0, 3, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": torch.zeros(3, 8)}, "x: got shape"),
        ({"branch": torch.zeros(2, 3, 7)}, "branch: got shape"),
        ({"branch": torch.zeros(2, 3, 8).half()}, "branch: got torch.float16"),
        ({"gate": torch.zeros(2, 8)}, r"gate: got shape \(2, 8\), expected \[8\] or \[2, 1, 8\]"),
        ({"weight": torch.zeros(9)}, "weight: got shape"),
    ],
)
def test_errors(arguments, words):
    given = {"x": torch.zeros(2, 3, 8), "branch": torch.zeros(2, 3, 8), **arguments}
    with torch.no_grad(), pytest.raises(ValueError, match=words):
        add_norm(given.pop("x"), given.pop("branch"), **given, eps=1e-5, backend="reference")

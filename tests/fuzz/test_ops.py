"""Every op under arguments that nobody thought of (op_cases.py), and the kinds of what such arguments have found."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import BEARABLE, ODD_NUMBERS, OTHER_TENSORS, TABLE, Case, Draw, is_extreme, judge, run, tensor_names

from ddfast import ops
from ddfast.ops import dispatch, geometry

BACKENDS = ["reference", *({"cpu"} & {*dispatch.available()})]


@pytest.mark.parametrize("op", sorted(TABLE))
@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(number=st.integers(0, 2**32))
def test_an_op_refuses_in_one_line_or_is_right(op: str, number: int) -> None:
    run(op, number)


def richest(op: str) -> int:
    """A number of valid arguments of which none is empty and few are left out."""

    def tensors(number: int) -> int:
        made = TABLE[op].make(Draw(number))
        names = tensor_names(made)
        return len(names) * all(made[name].numel() for name in names)

    return max(range(100), key=tensors)


@pytest.mark.parametrize("op", sorted(TABLE))
def test_every_argument_of_another_kind(op: str) -> None:
    """Each tensor in all ways, each setting with all numbers: of what `run` draws, everything once."""
    number = richest(op)
    for name in tensor_names(TABLE[op].make(Draw(number))):
        for how, change in (OTHER_TENSORS | BEARABLE).items():
            case = Case(op, TABLE[op].make(Draw(number)) | {"backend": "auto"}, [f"{name} {how}"], refusable=True)
            try:
                case.arguments[name] = change(case.arguments[name])
            except (RuntimeError, NotImplementedError):  # PyTorch makes no such tensor
                continue
            judge(case)
    for name in TABLE[op].settings:
        for value in ODD_NUMBERS:
            if name == "steps" and isinstance(value, int) and value > 100:
                continue
            case = Case(op, TABLE[op].make(Draw(number)) | {name: value}, [f"{name} {value!r}"], refusable=True)
            if is_extreme(name, value):
                case.spoilt.append((name, 0))
            judge(case)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float32)


def test_add_norm_takes_a_bias_of_each_row_beside_one_weight() -> None:
    x, weight, bias = normal(3, 2, 8), normal(8), normal(3, 1, 8)
    _, found = ops.add_norm(x, None, weight=weight, bias=bias, eps=1e-5)
    torch.testing.assert_close(found, torch.nn.functional.layer_norm(x, (8,), weight, None, 1e-5) + bias)


def test_codes_are_never_those_of_memory_that_was_not_written() -> None:
    """Logits without memory beside noise with: nothing was computed, and what was returned lay there before."""
    with pytest.raises(ValueError, match="noise: got device cpu, expected meta"):
        ops.sample_codes(normal(2, 5).to("meta"), normal(2, 3), normal(5, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_p_orders_by_logits_where_probabilities_are_equal(backend: str) -> None:
    logits = torch.tensor([[0.0, 1e-9, 3e-9, 2e-9]], dtype=torch.float32)
    kept = ops.filter_logits(logits, top_p=1e-9, backend=backend) > -math.inf
    assert kept.tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_of_a_longer_row_is_rotated(backend: str) -> None:
    room, keys, values = normal(1, 13), normal(1, 1, 2, 4), normal(1, 1, 2, 4)
    rope, position = normal(2, 2, 2), torch.tensor([1])
    results = [
        ops.decode_attention(qkv, keys.clone(), values.clone(), position, rope=rope, backend=backend)
        for qkv in (room[:, 1:], room[:, 1:].clone())
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_of_no_dimensions(backend: str) -> None:
    scalar = ops.noise(3, 4, (), backend=backend)
    assert scalar.shape == () and torch.equal(scalar, ops.noise(3, 4, (1,), backend=backend)[0])


@pytest.mark.parametrize("op", ["decode_attention", "append_normed"])
@pytest.mark.parametrize(
    "how", ["keys are values", "keys begin within values", "qkv lies in keys", "a leaf", "a view of a leaf", "negated"]
)
def test_caches_have_memory_of_their_own(op: str, how: str) -> None:
    room = normal(100)
    keys, values, qkv = room[:16].view(1, 2, 2, 4), room[40:56].view(1, 2, 2, 4), room[70:94]
    if how == "keys are values":
        values = keys
    elif how == "keys begin within values":
        values = room[15:31].view(1, 2, 2, 4)
    elif how == "qkv lies in keys":
        qkv = room[:24]
    elif how == "a leaf":
        keys = keys.clone().requires_grad_()
    elif how == "a view of a leaf":
        keys = keys.clone().requires_grad_().view_as(keys)
    else:
        keys = torch.complex(keys, -keys).conj().imag.expand_as(keys)
    qkv = qkv.view(1, 24) if op == "decode_attention" else qkv.view(1, 1, 3, 2, 4)
    where = torch.tensor([1]) if op == "decode_attention" else 1
    with pytest.raises(ValueError, match=r"keys: (got|requires)"):
        getattr(ops, op)(qkv, keys, values, where)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_out_of_float32s_range_are_blamed_on_what_is(backend: str) -> None:
    """Before, the flow of such a row was NaN, and its code the first one."""
    log_probs, noise, codebook = normal(2, 5).log_softmax(-1), normal(2, 3), normal(5, 3)
    noise[1, 0] = 3e38
    for sample in (ops.flow_sample, ops.sample_codes):
        with pytest.raises(ValueError, match=r"noise: got values of up to 3e\+38, expected at most 1e\+15"):
            sample(log_probs, noise, codebook, backend=backend)
        for factor in (1e-25, 1e25):
            with pytest.raises(ValueError, match=r"codebook: got codes up to .* from their mean, expected from 1e-15"):
                sample(log_probs, normal(2, 3), factor * codebook, backend=backend)
    with pytest.raises(ValueError, match=r"t: got values from 1e-30 to 1e-30, expected 1e-12 <= t <= 1"):
        ops.codebook_posterior(normal(2, 3), 1e-30, log_probs, codebook, backend=backend)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native module is not built")
def test_a_vector_too_far_from_all_codes_is_not_blamed_on_the_probabilities() -> None:
    x = normal(2, 3)
    x[1] = 1e30
    with pytest.raises(ValueError, match="x: row 1 is too far from all codes"):
        ops.codebook_posterior(x, 0.5, normal(2, 5).log_softmax(-1), normal(5, 3), backend="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gelu", "silu"])
def test_activations_end_at_zero(backend: str, kind: str) -> None:
    """The kernel's quotient was -1.8 at the largest of negative numbers."""
    x = torch.tensor([-3e38, -1e30, -1e5], dtype=torch.float32)
    assert float(ops.activate(x, kind=kind, backend=backend).abs().max()) < 1e-30


def test_steps_have_an_end() -> None:
    with pytest.raises(ValueError, match="steps: got 1099511627776, expected from 1 to 1048576"):
        ops.flow_sample(normal(2, 5).log_softmax(-1), normal(2, 3), normal(5, 3), steps=2**40)


def test_geometries_of_views_of_one_codebook_are_forgotten() -> None:
    """They live as long as the memory does, which is that of the model."""
    codebook = normal(300, 2)
    for count in range(2, 300):
        geometry.codebook_geometry(codebook[:count])
    assert len([1 for *_, kept in geometry._cache.values() if kept.codes.is_cpu]) <= geometry._MOST_CODEBOOKS


@pytest.mark.parametrize("seed", [np.uint64(2**64 - 1), np.int64(3)])
def test_numbers_of_numpy_are_those_of_python(seed: np.integer) -> None:
    assert torch.equal(ops.noise(seed, np.int64(2), (np.int32(3),)), ops.noise(int(seed), 2, (3,)))

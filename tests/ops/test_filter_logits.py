import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from truth import TOLERANCE, filtered

from ddfast.ops import dispatch, filter_logits

GOLDEN = load_file(Path(__file__).parents[1] / "data" / "filter_golden.safetensors")
GOLDEN_SETTINGS = [(0, 0.0), (14, 0.95), (1, 0.0), (64, 0.0), (0, 0.53), (5, 0.31), (0, 0.998), (20, 1.0)]


@settings(max_examples=30)
@given(
    rows=st.integers(1, 5),
    num_codes=st.sampled_from([1, 2, 7, 64, 1000, 4095]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 5, 63, 900, 5000]),
    top_p=st.sampled_from([1e-9, 0.05, 0.5, 0.95, 0.999, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ties=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_against_the_rules(rows, num_codes, temperature, top_k, top_p, dtype, ties, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, num_codes, generator=generator)
    logits = ((logits * 2).round() / 2 if ties else logits).to(dtype)
    truth = torch.from_numpy(filtered(logits.double().numpy(), temperature, top_k, top_p))
    for name in dispatch.available():
        got = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, backend=name)
        assert got.dtype == torch.float32
        # The nucleus edge compares masses: rounding may move it by one entry, if that mass is top_p up to rounding.
        differs = (got == -math.inf) != (truth == -math.inf)
        assert (differs.sum(-1) <= 1).all()
        assert torch.allclose(got.exp().sum(-1), torch.ones(rows), atol=1e-4)
        if bool(differs.any()):
            assert top_p < 1
            mass = torch.from_numpy(filtered(logits.double().numpy(), temperature, top_k, 1.0)).exp()
            for row in differs.any(-1).nonzero()[:, 0]:
                order = sorted(range(num_codes), key=lambda j, row=row: (-float(logits[row, j]), j))
                before = mass[row][order].cumsum(0) - mass[row][order]
                edge = int(differs[row].nonzero()[0, 0])
                assert abs(float(before[order.index(edge)]) - top_p) < 1e-5
        else:
            kept = truth > -math.inf
            assert (got[kept] - truth[kept]).abs().max() < TOLERANCE["filter_logits", dtype]


@pytest.mark.parametrize("case", range(len(GOLDEN_SETTINGS)))
def test_official_keep_rule(backend, case):
    """Kept entries of the official VAR filter, ties at the k-th value and at the nucleus edge included."""
    top_k, top_p = GOLDEN_SETTINGS[case]
    got = filter_logits(GOLDEN["flt_logits"], top_k=top_k, top_p=top_p or 1.0, backend=backend) > -math.inf
    official = GOLDEN[f"flt_{case}"] > -math.inf
    tied = GOLDEN[f"flt_{case}_tied"].bool()  # there the official code keeps an arbitrary one of the equal logits
    assert torch.equal(got[~tied], official[~tied])
    logits = GOLDEN["flt_logits"][tied]
    for row, mine, theirs in zip(logits, got[tied], official[tied], strict=True):
        assert torch.equal(row[mine].sort().values, row[theirs].sort().values)


@pytest.mark.parametrize(("num_codes", "top_k", "top_p"), [(16384, 8000, 1.0), (4096, 900, 0.95), (16385, 1, 1.0)])
def test_real_shapes(backend, num_codes, top_k, top_p):
    logits = 2.5 * torch.randn(16, num_codes)
    truth = torch.from_numpy(filtered(logits.double().numpy(), 1.0, top_k, top_p))
    got = filter_logits(logits, top_k=top_k, top_p=top_p, backend=backend)
    kept = (truth > -math.inf) & (got > -math.inf)
    assert ((got > -math.inf).sum(-1) - (truth > -math.inf).sum(-1)).abs().max() <= 1
    assert (got[kept] - truth[kept]).abs().max() < 2e-5


def test_guidance(backend):
    logits, uncond, scale = torch.randn(2, 3, 50), torch.randn(2, 3, 50), torch.rand(3) * 4
    guided = uncond.double() + scale[:, None].double() * (logits.double() - uncond.double())
    truth = filtered(guided.reshape(6, 50).numpy(), 1.3, 9, 1.0).reshape(2, 3, 50)
    got = filter_logits(logits, uncond=uncond, cfg_scale=scale, temperature=1.3, top_k=9, backend=backend).numpy()
    kept = truth > -np.inf
    assert np.array_equal(got > -np.inf, kept)
    assert np.abs(got[kept] - truth[kept]).max() < 2e-5


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.95}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_guided_equal_and_impossible_logits(backend, dtype, filters):
    """A row of equals, a code that cannot be, with guidance and without, in every dtype."""
    logits, uncond = (3 * torch.randn(2, 33)).to(dtype), torch.randn(2, 33).to(dtype)
    logits[0] = logits[0, 0]
    logits[:, 16] = -math.inf
    for guidance in ({}, {"uncond": uncond, "cfg_scale": 2.0}):
        got = filter_logits(logits, **guidance, **filters, temperature=0.9, backend=backend).double()
        values = logits.double() if not guidance else uncond.double() + 2 * (logits.double() - uncond.double())
        truth = torch.from_numpy(filtered(values.numpy(), **{"top_k": 0, "top_p": 1.0, "temperature": 0.9, **filters}))
        both = (got > -math.inf) & (truth > -math.inf)
        # A sum that lies within rounding of top_p may fall either way.
        assert ((got > -math.inf) != (truth > -math.inf)).sum(-1).max() <= (1 if "top_p" in filters else 0)
        assert (got - truth)[both].abs().max() <= TOLERANCE["filter_logits", torch.float32]


def test_minus_infinity_stays_out(backend):
    logits = torch.tensor([[-math.inf, 1.0, 1.0, -math.inf]])
    got = filter_logits(logits, uncond=logits, cfg_scale=3.0, backend=backend)
    assert got.exp().tolist() == [[0.0, 0.5, 0.5, 0.0]]


def test_strides(backend):
    wide = torch.randn(6, 3, 200)
    view = wide[::2, :, 50:150].transpose(0, 1)
    assert torch.equal(
        filter_logits(view, top_k=7, backend=backend), filter_logits(view.contiguous(), top_k=7, backend=backend)
    )


def test_empty(backend):
    assert filter_logits(torch.empty(0, 5), backend=backend).shape == (0, 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_values_name_the_row(backend, bad):
    logits = torch.randn(5, 20)
    logits[3, 4] = bad
    with pytest.raises(ValueError, match="logits: row 3 has NaN"):
        filter_logits(logits, backend=backend)


def test_a_row_without_support_is_named(backend):
    logits = torch.randn(5, 20)
    logits[2] = -math.inf
    with pytest.raises(ValueError, match="logits: row 2"):
        filter_logits(logits, backend=backend)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"uncond": torch.ones(2, 4)}, r"uncond: got shape \(2, 4\), expected \[2, 5\]"),
        ({"uncond": torch.ones(2, 5), "cfg_scale": torch.ones(3)}, r"cfg_scale: got shape \(3,\)"),
        ({"backend": "gpu"}, "backend: got 'gpu'"),
        ({"backend": "cuda"}, "backend: 'cuda' cannot run filter_logits"),
    ],
)
def test_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        filter_logits(torch.randn(2, 5), **arguments)

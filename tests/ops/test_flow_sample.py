import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from tiles import use_tile
from truth import flow_codes, problem

import ddfast
from ddfast.ops import dispatch, flow_sample, native, sample_codes
from ddfast.ops.flow_sample import SOLVERS
from ddfast.ops.geometry import codebook_geometry


@functools.cache
def exact(rows: int, num_codes: int, dim: int, peak: float, support: float, seed: int) -> torch.Tensor:
    """Hundreds of Heun steps in other coordinates, in float64; shared by the backends that are held against it.

    The codes are those of 2500 steps.
    """
    log_probs, noise, codebook = problem(rows, num_codes, dim, peak=peak, support=support, seed=seed)
    return torch.from_numpy(flow_codes(log_probs.numpy(), noise.numpy(), codebook.numpy(), 600))


def agreement(codes: torch.Tensor, truth: torch.Tensor) -> float:
    return (codes == truth).double().mean().item()


@pytest.mark.parametrize(
    ("num_codes", "dim", "peak", "support"),
    [(64, 4, 2.0, 1.0), (256, 8, 1.0, 0.4), (512, 32, 3.0, 0.3), (128, 200, 3.0, 1.0)],
)
def test_exact_map(backend, num_codes, dim, peak, support, interpreted, monkeypatch):
    """The default solver against a float64 integration that shares nothing with it."""
    log_probs, noise, codebook = problem(500, num_codes, dim, peak=peak, support=support, seed=1)
    truth = exact(500, num_codes, dim, peak, support, 1)
    if interpreted:
        use_tile(monkeypatch, 128, min(num_codes, 256))
        log_probs, noise, truth = log_probs[:250], noise[:250], truth[:250]
    codes, x = flow_sample(log_probs.float(), noise.float(), codebook.float(), backend=backend)
    assert agreement(codes, truth) >= 0.99
    assert torch.equal(x, codebook.float()[codes])


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_every_solver_converges(backend, solver, interpreted, monkeypatch):
    if interpreted:
        use_tile(monkeypatch, 128, 64)
    rows = 128 if interpreted else 300
    log_probs, noise, codebook = problem(300, 64, 4, seed=2)
    log_probs, noise, truth = log_probs[:rows], noise[:rows], exact(300, 64, 4, 2.0, 1.0, 2)[:rows]
    log_probs, noise, codebook = log_probs.float(), noise.float(), codebook.float()
    evaluations = 200 if interpreted else 400
    coarse, fine = (
        agreement(flow_sample(log_probs, noise, codebook, steps=steps, solver=solver, backend=backend)[0], truth)
        for steps in (5, evaluations // 2 if solver == "heun" else evaluations)
    )
    assert fine >= 0.99
    assert fine > coarse


def test_higher_order_is_worth_it():
    log_probs, noise, codebook = problem(3000, 64, 4, seed=3)
    exact, _ = flow_sample(log_probs, noise, codebook, steps=400)
    wrong = [
        (flow_sample(log_probs, noise, codebook, steps=10, solver=solver)[0] != exact).sum()
        for solver in ("euler", "dpm2m", "dpm3m")
    ]
    assert wrong[0] > 2 * wrong[1] > 2 * wrong[2]


def test_frequencies(backend, interpreted, monkeypatch):
    """Pushed-forward noise has the distribution asked for: chi-square over V=64 codes, 50,000 noises."""
    draws = 5_000 if interpreted else 50_000
    if interpreted:
        use_tile(monkeypatch, 512, 64)
    log_probs, _, codebook = (tensor.float() for tensor in problem(1, 64, 4, peak=1.0, seed=4))
    noise = ddfast.noise(11, torch.arange(draws), (4,))
    codes, _ = flow_sample(log_probs.expand(draws, 64), noise, codebook, backend=backend)
    wanted = log_probs[0].exp() * draws
    statistic = ((torch.bincount(codes, minlength=64) - wanted).square() / wanted).sum()
    assert interpreted or wanted.min() > 5
    assert chi2.sf(float(statistic), 63) > 1e-3


@pytest.mark.skipif(native.cpu is None, reason="the native module is not built")
@pytest.mark.parametrize(
    ("num_codes", "dim", "peak", "support"),
    [(8, 2, 1.5, 1.0), (64, 4, 2.0, 1.0), (1024, 8, 1.0, 0.5), (512, 32, 3.0, 0.3), (1100, 256, 2.5, 1.0)],
)
def test_early_exit_is_never_wrong(num_codes, dim, peak, support):
    """A token that stops early has the code of the same token integrated to the end: no false exit in 64,200."""
    rows = 20_000 if num_codes < 1000 else 4_000 if dim < 64 else 200
    log_probs, noise, codebook = (
        tensor.float().contiguous() for tensor in problem(rows, num_codes, dim, peak=peak, support=support, seed=7)
    )
    geometry = codebook_geometry(codebook)
    results = []
    for early_exit in (True, False):
        codes, evaluations = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int32)
        native.cpu.flow_sample(
            log_probs.data_ptr(), 0, num_codes, noise.data_ptr(), codebook.data_ptr(), geometry.packed.data_ptr(),
            codes.data_ptr(), evaluations.data_ptr(), rows, num_codes, dim,
            200, SOLVERS["dpm3m"], geometry.sigma_min, early_exit, torch.get_num_threads(),
        )  # fmt: skip
        results.append((codes, evaluations.double().mean()))
    (early, used), (full, all_steps) = results
    assert torch.equal(early, full)
    assert used < 0.95 * all_steps


@settings(max_examples=40)
@given(
    rows=st.integers(1, 60),
    num_codes=st.sampled_from([1, 2, 7, 65, 1023]),
    dim=st.sampled_from([1, 2, 8, 33]),
    support=st.sampled_from([0.0, 0.2, 1.0]),
    peak=st.sampled_from([0.0, 2.0, 20.0]),
    solver=st.sampled_from(sorted(SOLVERS)),
    steps=st.sampled_from([1, 3, 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_backends_agree(rows, num_codes, dim, support, peak, solver, steps, dtype, seed):
    log_probs, noise, codebook = problem(rows, num_codes, dim, support=support, peak=peak, seed=seed)
    log_probs, noise, codebook = log_probs.to(dtype), noise.float(), codebook.float()
    reference, _ = flow_sample(log_probs, noise, codebook, steps=steps, solver=solver, backend="reference")
    for name in dispatch.available():
        codes, _ = flow_sample(log_probs, noise, codebook, steps=steps, solver=solver, backend=name)
        assert (log_probs.gather(1, codes[:, None]) > -math.inf).all()
        # Tokens on a basin's boundary may fall either way in float32; early exit answers for the exact flow.
        slack = 2 if steps == 20 else 0.25 * rows + 2
        assert (codes != reference).sum() <= slack


@pytest.mark.parametrize(
    ("num_codes", "dim", "solver"),
    [(1100, 256, "dpm3m"), (4500, 65, "euler"), (263, 1024, "heun"), (520, 520, "dpm2m")],
)
def test_rows_that_keep_most_of_a_large_codebook(backend, num_codes, dim, solver, interpreted):
    """Which the CPU's kernel does together: of every row the reference's code, whichever rows are beside it."""
    rows = 4 if interpreted else 23
    log_probs, noise, codebook = (tensor.float() for tensor in problem(rows, num_codes, dim, peak=2.0, seed=5))
    log_probs[1::3, num_codes // 3 :] = -math.inf
    log_probs[-1] = torch.arange(num_codes) * -50.0  # the first code, and no spread to speak of
    codes, x = flow_sample(log_probs, noise, codebook, solver=solver, backend=backend)
    wide = log_probs.double(), noise.double(), codebook.double()
    exact, _ = flow_sample(*wide, solver=solver, backend="reference")
    assert torch.equal(codes, exact)
    assert int(codes[-1]) == 0
    assert torch.equal(x, codebook[codes])
    if backend != "reference":
        order = torch.arange(rows - 1, -1, -1)
        again, _ = flow_sample(log_probs[order], noise[order], codebook, solver=solver, backend=backend)
        assert torch.equal(again[order], codes)
    kept = 2 * num_codes // 3
    sampled, _ = sample_codes(log_probs, noise, codebook, top_k=kept, solver=solver, backend=backend)
    exact, _ = sample_codes(*wide, top_k=kept, solver=solver, backend="reference")
    assert torch.equal(sampled, exact)


def test_codes_do_not_depend_on_the_batch(backend, interpreted):
    rows = 8 if interpreted else 64
    log_probs, noise, codebook = (tensor.float() for tensor in problem(rows, 200, 8, support=0.5))
    together, _ = flow_sample(log_probs, noise, codebook, backend=backend)
    if backend == "reference":  # its matrix products round by batch: only kernels promise this bit for bit
        return
    alone = torch.cat(
        [flow_sample(log_probs[i : i + 1], noise[i : i + 1], codebook, backend=backend)[0] for i in range(rows)]
    )
    assert torch.equal(together, alone)


def test_one_code_left(backend):
    log_probs, noise, codebook = (tensor.float() for tensor in problem(30, 50, 4, support=0.0))
    codes, _ = flow_sample(log_probs, noise, codebook, backend=backend)
    assert torch.equal(codes, log_probs.argmax(-1))


def test_duplicate_codes_go_to_the_likelier_then_the_lower(backend):
    codebook = torch.ones(6, 3)
    log_probs = torch.tensor([[0.1, 0.2, 0.3, 0.3, 0.05, 0.05]]).log()
    codes, _ = flow_sample(log_probs, torch.randn(1, 3), codebook, backend=backend)
    assert codes.tolist() == [2]


def test_leading_dimensions_and_strides(backend):
    log_probs, noise, codebook = (tensor.float() for tensor in problem(24, 30, 4))
    codes, x = flow_sample(
        log_probs.view(4, 6, 30).transpose(0, 1), noise.view(4, 6, 4).transpose(0, 1), codebook, backend=backend
    )
    assert codes.shape == (6, 4)
    assert x.shape == (6, 4, 4)
    assert torch.equal(codes.T.reshape(-1), flow_sample(log_probs, noise, codebook, backend=backend)[0])


def test_empty(backend):
    codes, x = flow_sample(torch.empty(2, 0, 7), torch.empty(2, 0, 4), torch.randn(7, 4), backend=backend)
    assert codes.shape == (2, 0)
    assert x.shape == (2, 0, 4)


LOG_P, NOISE, CODES = torch.zeros(3, 5), torch.randn(3, 4), torch.randn(5, 4)


@pytest.mark.parametrize(
    ("arguments", "settings_", "words"),
    [
        ((LOG_P, NOISE, CODES), {"steps": 0}, "steps: got 0"),
        ((LOG_P, NOISE, CODES), {"solver": "rk4"}, "solver: got 'rk4', expected one of euler"),
        ((torch.zeros(2, 5), NOISE, CODES), {}, r"log_probs: got shape \(2, 5\)"),
        ((torch.zeros(5), NOISE, CODES), {}, r"log_probs: got shape \(5,\), expected \[3, 5\]"),
        ((LOG_P, NOISE * math.nan, CODES), {}, "noise: got NaN"),
        ((torch.full((3, 5), -math.inf), NOISE, CODES), {}, "log_probs: row 0"),
        ((LOG_P * math.nan, NOISE, CODES), {}, "log_probs: row 0"),
    ],
)
def test_errors(backend, arguments, settings_, words):
    with pytest.raises(ValueError, match=words):
        flow_sample(*arguments, **settings_, backend=backend)

"""flow_sample and sample_codes: one kernel, on the emulator."""

import math

import pytest
import torch
from emulation import SHARED_LIMIT, guided_rows
from truth import flow_codes, problem

from ddfast.ops import native
from ddfast.ops.filter_logits import filter_logits_reference
from ddfast.ops.flow_sample import SOLVERS, flow_sample_reference
from ddfast.ops.geometry import codebook_geometry


def small(rows, num_codes, dim, **options):
    return [tensor.float() for tensor in problem(rows, num_codes, dim, **options)]


# ---- the flow ----


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize(
    ("rows", "num_codes", "dim", "support", "cluster"),
    [(2, 1, 1, 1.0, 1), (6, 7, 3, 1.0, 1), (6, 64, 8, 0.5, 2), (4, 300, 32, 0.5, 1), (3, 101, 64, 1.0, 1),
     (3, 257, 16, 1.0, 2), (3, 130, 33, 1.0, 1), (1, 300, 8, 1.0, 8), (6, 7, 3, 1.0, 0), (6, 64, 8, 0.5, 0),
     (3, 257, 16, 1.0, 0), (4, 300, 32, 0.5, 0), (3, 130, 33, 1.0, 0)],
)  # fmt: skip
def test_against_the_reference(emulator, solver, rows, num_codes, dim, support, cluster):
    log_probs, noise, codebook = small(rows, num_codes, dim, support=support, seed=3)
    exact = flow_sample_reference(log_probs.double(), noise.double(), codebook.double(), 20, solver)
    full = 41 if solver == "heun" else 21
    for early_exit in (True, False):
        codes, evaluations = emulator.sample_codes(
            log_probs, noise, codebook, solver=solver, early_exit=early_exit, cluster=cluster
        )
        assert torch.equal(codes, exact)
        assert (evaluations <= full).all() if early_exit else (evaluations == (full if num_codes > 1 else 0)).all()


@pytest.mark.parametrize(
    ("num_codes", "dim", "top_k", "top_p"), [(16384, 8, 8000, 1.0), (16384, 8, 0, 1.0), (4096, 32, 900, 0.95)]
)
def test_real_shapes(emulator, num_codes, dim, top_k, top_p):
    generator = torch.Generator().manual_seed(num_codes)
    logits, noise = 2.5 * torch.randn(2, num_codes, generator=generator), torch.randn(2, dim, generator=generator)
    codebook = torch.nn.functional.normalize(torch.randn(num_codes, dim, generator=generator), dim=-1)
    codes, _ = emulator.sample_codes(logits, noise, codebook, top_k=top_k, top_p=top_p)
    log_probs = filter_logits_reference(logits.double(), None, None, 1.0, top_k, top_p)
    assert torch.equal(codes, flow_sample_reference(log_probs, noise.double(), codebook.double(), 20, "dpm3m"))


@pytest.mark.parametrize("cluster", [0, 1])
@pytest.mark.parametrize(
    ("num_codes", "dim"), [(512, 8), (1025, 8), (255, 16), (769, 16), (129, 32), (385, 32), (257, 64)]
)
def test_chunks_of_codes_that_are_full_or_hold_one(emulator, num_codes, dim, cluster):
    """Those beyond are passed over; a row of 128 codes fills one chunk of 32 coordinates in narrow blocks."""
    log_probs, noise, codebook = small(3, num_codes, dim, seed=num_codes)
    log_probs[1, 5:] = -math.inf
    exact = flow_sample_reference(log_probs.double(), noise.double(), codebook.double(), 20, "dpm3m")
    for early_exit in (True, False):
        codes, _ = emulator.sample_codes(log_probs, noise, codebook, early_exit=early_exit, cluster=cluster)
        assert torch.equal(codes, exact)


@pytest.mark.parametrize("cluster", [0, 1, 4])
@pytest.mark.parametrize(("num_codes", "dim"), [(6000, 8), (2500, 16), (1500, 32), (900, 64)])
@pytest.mark.parametrize(
    "shared_limit", [SHARED_LIMIT, 70 << 10, 56 << 10], ids=["staged", "partly", "lists in scratch"]
)
def test_more_codes_than_registers_hold(emulator, num_codes, dim, cluster, shared_limit):
    """Some are staged in shared memory, where there is room, and the rest is read in every evaluation."""
    emulator.configure(shared_limit=shared_limit)
    log_probs, noise, codebook = small(2, num_codes, dim, seed=5)
    codes, _ = emulator.sample_codes(log_probs, noise, codebook, cluster=cluster)
    assert torch.equal(codes, flow_sample_reference(log_probs, noise, codebook, 20, "dpm3m"))


@pytest.mark.parametrize("shared_limit", [SHARED_LIMIT, 120 << 10])
@pytest.mark.parametrize("seed", [0, 4])
def test_rows_that_keep_too_much_are_left_to_a_second_launch(emulator, shared_limit, seed):
    """Beside rows that do not and bad ones; each as it is alone."""
    emulator.configure(shared_limit=shared_limit, seed=seed, multiprocessors=3)
    log_probs, noise, codebook = small(9, 2000, 32, seed=6)
    capacity, blocks = emulator.flow_plan(2000, 32)
    assert 500 < capacity < 1900
    assert blocks > 0
    for row, kept in enumerate([1, 400, 1900, 600, 2000, 2000, 30, 1950, capacity]):
        log_probs[row, kept:] = -math.inf
    log_probs[5, 7] = math.nan
    codes, evaluations = emulator.sample_codes(log_probs, noise, codebook)
    good = torch.tensor([0, 1, 2, 3, 4, 6, 7, 8])
    assert codes[5] == -1
    assert torch.equal(codes[good], flow_sample_reference(log_probs[good], noise[good], codebook, 20, "dpm3m"))
    for row in (2, 3, 7, 8):
        alone = emulator.sample_codes(log_probs[row : row + 1], noise[row : row + 1].contiguous(), codebook)
        assert (alone[0].item(), alone[1].item()) == (codes[row].item(), evaluations[row].item())


def test_against_another_integrator(emulator):
    """Shares no coordinate, grid, start or coefficient with the kernel."""
    log_probs, noise, codebook = problem(20, 64, 8, seed=8)
    truth = torch.from_numpy(flow_codes(log_probs.numpy(), noise.numpy(), codebook.numpy(), 3000))
    codes, _ = emulator.sample_codes(log_probs.float(), noise.float(), codebook.float(), steps=60)
    assert torch.equal(codes, truth)


@pytest.mark.parametrize(("dim", "peak"), [(2, 1.0), (8, 4.0), (32, 2.5)])
def test_early_exit_never_changes_a_code(emulator, dim, peak):
    log_probs, noise, codebook = small(30, 128, dim, peak=peak, seed=1)
    early, used = emulator.sample_codes(log_probs, noise, codebook, cluster=1)
    full, all_of_them = emulator.sample_codes(log_probs, noise, codebook, early_exit=False, cluster=1)
    assert torch.equal(early, full)
    assert used.float().mean() < 0.9 * all_of_them.float().mean()


def test_exits_when_the_cpu_kernel_does(emulator):
    if native.cpu is None:
        pytest.skip(native.cpu_reason)
    log_probs, noise, codebook = small(30, 200, 8, seed=6)
    codes, evaluations = emulator.sample_codes(log_probs, noise, codebook)
    geometry = codebook_geometry(codebook)
    cpu_codes, cpu_evaluations = torch.empty(30, dtype=torch.int64), torch.empty(30, dtype=torch.int32)
    native.cpu.flow_sample(
        log_probs.data_ptr(), 0, 200, noise.data_ptr(), codebook.data_ptr(), geometry.packed.data_ptr(),
        cpu_codes.data_ptr(), cpu_evaluations.data_ptr(), 30, 200, 8, 20, SOLVERS["dpm3m"], geometry.sigma_min, True, 1,
    )  # fmt: skip
    assert torch.equal(codes, cpu_codes)
    assert (evaluations - cpu_evaluations).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cluster", [1, 2])
def test_guidance_temperature_filter_and_strides(emulator, dtype, cluster):
    logits, guidance = guided_rows(dtype)
    generator = torch.Generator().manual_seed(5)
    noise, codebook = torch.randn(6, 8, generator=generator), torch.randn(999, 8, generator=generator)
    options = {**guidance, "temperature": 0.8, "top_k": 200, "top_p": 0.9}
    log_probs = filter_logits_reference(logits, **options)
    codes, _ = emulator.sample_codes(logits, noise, codebook, cluster=cluster, **options)
    assert torch.equal(codes, flow_sample_reference(log_probs, noise, codebook, 20, "dpm3m"))


def test_minus_infinity_in_both_stays_out(emulator):
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 1.0]])
    noise, codebook = torch.randn(1, 2), torch.randn(4, 2)
    codes, _ = emulator.sample_codes(logits, noise, codebook, uncond=logits.clone(), cfg_scale=torch.tensor([3.0]))
    assert codes.item() in (1, 3)


def test_frequencies_are_p(emulator):
    generator = torch.Generator().manual_seed(2)
    count, num_codes = 300, 4
    codebook = torch.randn(num_codes, 4, generator=generator)
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    noise = torch.randn(count, 4, generator=generator)
    codes, _ = emulator.sample_codes(p.log().expand(count, -1), noise, codebook)
    chi_square = ((torch.bincount(codes, minlength=num_codes) - count * p) ** 2 / (count * p)).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


# ---- what must not matter ----


@pytest.mark.parametrize("cluster", [0, 1, 2, 4])
def test_the_order_of_threads_and_the_batch_do_not_matter(emulator, cluster):
    logits, noise, codebook = small(4, 700, 32, seed=7)
    options = {"top_k": 400, "top_p": 0.95, "cluster": cluster}
    codes, evaluations = emulator.sample_codes(logits, noise, codebook, **options)
    for seed in (1, 2):
        emulator.configure(seed=seed)
        again = emulator.sample_codes(logits, noise, codebook, **options)
        assert torch.equal(again[0], codes)
        assert torch.equal(again[1], evaluations)
    alone = emulator.sample_codes(logits[3:4], noise[3:4].contiguous(), codebook, **options)
    assert (alone[0].item(), alone[1].item()) == (codes[3].item(), evaluations[3].item())


@pytest.mark.parametrize("cluster", [1, 2])
def test_lists_in_global_memory_give_the_same(emulator, cluster):
    logits, noise, codebook = small(3, 8000, 8, seed=9)
    expected = emulator.sample_codes(logits, noise, codebook, top_k=500, cluster=cluster)
    emulator.configure(shared_limit=64 << 10)
    again = emulator.sample_codes(logits, noise, codebook, top_k=500, cluster=cluster)
    assert torch.equal(again[0], expected[0])
    assert torch.equal(again[1], expected[1])


@pytest.mark.parametrize(("cluster", "multiprocessors"), [(1, 4), (2, 9), (8, 3)])
def test_more_rows_than_scratch_holds(emulator, cluster, multiprocessors):
    """12 rows on 4 places, or on one: the last reuse the first blocks."""
    logits = torch.full((12, 6000 * cluster), -math.inf)
    logits[torch.arange(12), torch.arange(12) * 5] = 0.0
    emulator.configure(shared_limit=64 << 10, multiprocessors=multiprocessors)
    places = max(1, multiprocessors // cluster)
    padded = -(-6000 // 32) * 32  # codes per block
    assert emulator.flow_scratch(12, 6000 * cluster, 1, cluster=cluster) == places * cluster * padded * 2 * 4
    codes, _ = emulator.sample_codes(logits, torch.zeros(12, 1), torch.randn(6000 * cluster, 1), cluster=cluster)
    assert torch.equal(codes, torch.arange(12) * 5)


def test_scratch_is_for_the_rows_that_a_device_holds(emulator):
    """Where a row's lists are in global memory: 2 MiB of them at V = 262144, and an H200 holds 16 clusters of 8."""
    assert emulator.flow_scratch(4096, 262144, 8) == 32 << 20
    assert emulator.flow_scratch(4096, 262144, 8, 8000) == 32 << 20
    assert emulator.flow_scratch(3, 262144, 8, 8000) == 3 * 2 << 20
    assert emulator.flow_scratch(4096, 16384, 8) == 0  # in shared memory


def test_choice_of_blocks(emulator):
    assert emulator.flow_plan(16384, 8, 8000) == (-1, 2)  # 64 rows of LlamaGen: 128 of an H200's 132 multiprocessors
    assert emulator.flow_plan(16384, 8) == (-1, 4)
    assert emulator.flow_plan(4096, 32, 900, 0.95) == (1024, 0)  # VAR
    assert emulator.flow_plan(4096, 32) == (1024, 4)
    assert emulator.flow_plan(4096, 32, 2000) == (-1, 2)
    assert emulator.flow_plan(4096, 32, 2000, 0.9) == (1024, 2)
    assert emulator.flow_plan(64, 8) == (2048, 0)
    emulator.configure(clusters=False)
    assert emulator.flow_plan(16384, 8, 8000) == (-1, 1)


# ---- rows at the edges ----


@pytest.mark.parametrize("cluster", [0, 1, 2])
def test_bad_rows_get_minus_one_and_leave_others_alone(emulator, cluster):
    logits, noise, codebook = small(8, 70, 8, seed=2)
    good, _ = emulator.sample_codes(logits, noise, codebook, cluster=cluster)
    logits[1, 69] = math.nan
    logits[2, 0] = math.inf
    logits[3] = -math.inf
    noise[4, 7] = math.nan
    noise[5, 0] = -math.inf
    logits[6] = -math.inf
    logits[6, 41] = -5.0
    codes, evaluations = emulator.sample_codes(logits, noise, codebook, cluster=cluster)
    assert codes.tolist() == [good[0].item(), -1, -1, -1, -1, -1, 41, good[7].item()]
    assert evaluations[1:7].tolist() == [0] * 6


def test_duplicate_codes_go_to_the_likelier_then_the_lower(emulator):
    log_probs = torch.tensor([[0.1, 0.2, 0.3, 0.3, 0.05, 0.05]]).log()
    codes, _ = emulator.sample_codes(log_probs, torch.randn(1, 3), torch.ones(6, 3))
    assert codes.tolist() == [2]


def test_far_from_the_origin(emulator):
    log_probs, noise, codebook = small(20, 64, 8)
    moved = (codebook * 64).round() / 64 + 1000  # exactly representable: the same problem, translated
    near = moved - 1000
    assert torch.equal(
        emulator.sample_codes(log_probs, noise, moved)[0], emulator.sample_codes(log_probs, noise, near)[0]
    )


def test_empty_and_refused(emulator):
    assert emulator.sample_codes(torch.zeros(0, 7), torch.zeros(0, 4), torch.randn(7, 4))[0].shape == (0,)
    with pytest.raises(RuntimeError, match="status 1"):
        emulator.sample_codes(torch.zeros(1, 7), torch.zeros(1, 65), torch.randn(7, 65))
    with pytest.raises(RuntimeError, match="status 1"):
        emulator.sample_codes(torch.zeros(1, 7), torch.zeros(1, 4), torch.randn(7, 4), cluster=3)


@pytest.mark.parametrize("cluster", [0, 2])
def test_noise_so_large_that_no_score_is_a_number_is_marked(emulator, cluster):
    """Finite, but not what comes of it."""
    log_probs, noise, codebook = (tensor.float() for tensor in problem(4, 90, 8))
    noise[1] = torch.tensor([1e37, -1e37] * 4)
    noise[2] = torch.tensor([3e38, -3e38] * 4)
    codes, _ = emulator.sample_codes(log_probs, noise, codebook, cluster=cluster)
    assert (codes[[0, 3]] >= 0).all() and (codes[[1, 2]] == -1).all()

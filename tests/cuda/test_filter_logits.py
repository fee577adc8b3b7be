"""filter_logits, and the thresholds that sample_codes shares with it, on the emulator."""

import math
from pathlib import Path

import pytest
import torch
from emulation import guided_rows
from safetensors.torch import load_file
from truth import filtered

from ddfast.ops.filter_logits import filter_logits_reference

GOLDEN = load_file(Path(__file__).parents[1] / "data" / "filter_golden.safetensors")
GOLDEN_SETTINGS = [(0, 0.0), (14, 0.95), (1, 0.0), (64, 0.0), (0, 0.53), (5, 0.31), (0, 0.998), (20, 1.0)]


def assert_filtered(emulator, logits, cluster, *, uncond=None, cfg_scale=None, temperature=1.0, top_k=0, top_p=1.0):
    settings = {"uncond": uncond, "cfg_scale": cfg_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    ours = emulator.filter_logits(logits, cluster, **settings)
    expected = filter_logits_reference(logits, **settings)
    assert torch.equal(ours > -math.inf, expected > -math.inf)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("cluster", [0, 1, 2, 4])
@pytest.mark.parametrize("num_codes", [1, 2, 33, 700, 4095])
@pytest.mark.parametrize(
    ("dtype", "ties"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, False)]
)
def test_against_the_reference(emulator, cluster, num_codes, dtype, ties):
    generator = torch.Generator().manual_seed(num_codes)
    logits = 3 * torch.randn(2, num_codes, generator=generator)
    logits = ((logits * 2).round() / 2 if ties else logits).to(dtype)
    emulator.configure(seed=num_codes)
    for top_k, top_p, temperature in [(0, 1.0, 1.0), (1, 1.0, 0.3), (5, 0.5, 1.0), (300, 0.9, 2.5), (0, 0.02, 1.0)]:
        assert_filtered(emulator, logits, cluster, top_k=top_k, top_p=top_p, temperature=temperature)


@pytest.mark.parametrize("case", range(len(GOLDEN_SETTINGS)))
def test_official_keep_rule(emulator, case):
    """As in tests/ops/test_filter_logits.py: the entries that the official VAR filter keeps."""
    top_k, top_p = GOLDEN_SETTINGS[case]
    logits = GOLDEN["flt_logits"]
    got = emulator.filter_logits(logits.flatten(0, -2), top_k=top_k, top_p=top_p or 1.0).view(logits.shape) > -math.inf
    official, tied = GOLDEN[f"flt_{case}"] > -math.inf, GOLDEN[f"flt_{case}_tied"].bool()
    assert torch.equal(got[~tied], official[~tied])
    for row, mine, theirs in zip(logits[tied], got[tied], official[tied], strict=True):
        assert torch.equal(row[mine].sort().values, row[theirs].sort().values)


@pytest.mark.parametrize("cluster", [1, 2])
def test_ties_at_the_nucleus_edge_stay_by_index(emulator, cluster):
    logits = torch.zeros(2, 1000)
    logits[1, 500:] = 1.0
    logits[1, ::7] = -math.inf
    for top_p in (1e-9, 0.1, 0.55, 0.999):
        assert_filtered(emulator, logits, cluster, top_p=top_p)
    truth = torch.from_numpy(filtered(logits.double().numpy(), 1.0, 0, 0.1)) > -math.inf
    assert torch.equal(emulator.filter_logits(logits, cluster, top_p=0.1) > -math.inf, truth)


def test_extreme_values(emulator):
    logits = torch.tensor([[3e38, -3e38, 0.0, -0.0, 1e-45, -1e-45, -math.inf, 1e-38]]).repeat(1, 5)
    for top_k in (1, 3, 6, 12, 20, 27):
        assert_filtered(emulator, logits, 1, top_k=top_k)
    assert_filtered(emulator, torch.tensor([[1.0, 0.0, -0.0, -1.0, 0.0]]), 1, top_p=0.6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cluster", [0, 2])
def test_guidance_and_strides(emulator, dtype, cluster):
    logits, guidance = guided_rows(dtype)
    logits[:, 3] = guidance["uncond"][:, 3] = -math.inf
    assert_filtered(emulator, logits, cluster, **guidance, temperature=0.8, top_k=200, top_p=0.9)


@pytest.mark.parametrize("cluster", [0, 1, 4])
def test_keys_in_global_memory(emulator, cluster):
    """Also more rows than places: 9 on the 6 of 3 multiprocessors."""
    emulator.configure(shared_limit=40 << 10, multiprocessors=3 if cluster == 1 else 132)
    rows = 9 if cluster == 1 else 3
    logits = torch.randn(rows, 9000, generator=torch.Generator().manual_seed(5))
    padded = -(-9000 // 32) * 32
    assert cluster != 1 or emulator.filter_scratch(rows, 9000, cluster) == 6 * padded * 4
    assert_filtered(emulator, logits, cluster, top_k=500, top_p=0.9)


def test_scratch_is_for_the_rows_that_a_device_holds(emulator):
    """Where a row's keys are in global memory: 2 MiB at V = 524288, and an H200 holds 33 clusters of 8."""
    assert emulator.filter_scratch(4096, 524288) == 33 * 2 << 20
    assert emulator.filter_scratch(3, 524288) == 3 * 2 << 20
    assert emulator.filter_scratch(4096, 262144) == 0  # in shared memory


@pytest.mark.parametrize("cluster", [1, 2])
def test_the_order_of_threads_and_the_batch_do_not_matter(emulator, cluster):
    logits = torch.randn(4, 700, generator=torch.Generator().manual_seed(7))
    expected = emulator.filter_logits(logits, cluster, top_k=400, top_p=0.95)
    for seed in (1, 2):
        emulator.configure(seed=seed)
        assert torch.equal(emulator.filter_logits(logits, cluster, top_k=400, top_p=0.95), expected)
    assert torch.equal(emulator.filter_logits(logits[3:], cluster, top_k=400, top_p=0.95), expected[3:])


def test_bad_rows_are_nan_and_leave_others_alone(emulator):
    logits = torch.randn(6, 70)
    good = emulator.filter_logits(logits)
    logits[1, 69], logits[2, 0], logits[3], logits[4] = math.nan, math.inf, -math.inf, -math.inf
    logits[4, 41] = -5.0
    ours = emulator.filter_logits(logits)
    assert ours[1:4].isnan().all()
    assert torch.equal(ours[[0, 5]], good[[0, 5]])
    assert ours[4, 41] == 0.0
    assert (ours[4] > -math.inf).sum() == 1


def test_empty_and_refused(emulator):
    assert emulator.filter_logits(torch.zeros(0, 7)).shape == (0, 7)
    with pytest.raises(RuntimeError, match="status 1"):
        emulator.filter_logits(torch.zeros(1, 7), cluster=3)

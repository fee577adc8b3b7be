"""draw_codes on the emulator."""

import math

import pytest
import torch
from emulation import guided_rows

from ddfast.ops.draw_codes import draw_codes_reference
from ddfast.ops.filter_logits import filter_logits_reference

NEARLY_ONE = 1 - 2.0**-24
ROUNDING = 5e-7


def numbers(rows: int) -> torch.Tensor:
    """Of U[0, 1); the first three are its ends and the least but 0 that PyTorch draws."""
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(rows))
    uniform[:3] = torch.tensor([0.0, NEARLY_ONE, 2.0**-24])[:rows]
    return uniform


def assert_drawn(emulator, logits, uniform, cluster, **settings):
    """The reference's codes, but for numbers so close to a boundary between two codes that rounding decides."""
    codes = emulator.draw_codes(logits, uniform, cluster, **settings)
    log_probs = filter_logits_reference(logits, **settings)
    mass = log_probs.double().exp().cumsum(-1)
    goal = uniform.double() * mass[:, -1]
    near = (mass - goal[:, None]).abs().amin(1) <= ROUNDING
    sure = ~near | (uniform == 0)
    assert torch.equal(codes[sure], draw_codes_reference(log_probs, uniform)[sure])
    index = codes[:, None]
    after = mass.gather(1, index)[:, 0]
    before = after - log_probs.gather(1, index)[:, 0].double().exp()
    assert ((before <= goal + ROUNDING) & (after >= goal - ROUNDING)).all()
    assert (log_probs.gather(1, index) > -math.inf).all()


@pytest.mark.parametrize("cluster", [1, 2, 4])
@pytest.mark.parametrize(("num_codes", "dtype"), [
    (1, torch.float32), (2, torch.bfloat16), (33, torch.float32), (700, torch.float16), (2048, torch.bfloat16),
    (4095, torch.float32), (4100, torch.bfloat16),
])  # fmt: skip
def test_against_the_reference(emulator, cluster, num_codes, dtype):
    """Also with ties in the even rows."""
    logits = 3 * torch.randn(6, num_codes, generator=torch.Generator().manual_seed(num_codes))
    logits[::2] = (2 * logits[::2]).round() / 2
    emulator.configure(seed=num_codes)
    for top_k, top_p, temperature in [(0, 1.0, 1.0), (1, 1.0, 0.3), (5, 0.5, 1.0), (300, 0.9, 2.5), (0, 0.02, 1.0)]:
        settings = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
        assert_drawn(emulator, logits.to(dtype), numbers(6), cluster, **settings)


@pytest.mark.parametrize("cluster", [1, 2])
def test_equal_codes_share_the_numbers_exactly(emulator, cluster):
    places = torch.tensor([0.0, 1.0, 1.0 - 2.0**-13, 77.0, 2046.0, 2047.0, 2048.0 - 2.0**-13])
    uniform = places / 2048
    logits = torch.zeros(len(places), 2048)
    assert torch.equal(emulator.draw_codes(logits, uniform, cluster), places.long())
    logits[:, 1::2] = -1.0  # which top-k drops
    assert torch.equal(emulator.draw_codes(logits, uniform, cluster, top_k=9), 2 * (places / 2).long())


def test_the_nearest_number_inside(emulator):
    logits = torch.tensor([[-math.inf, 0.0, 2.0, 1.0, -5.0, -math.inf]]).repeat(5, 1)
    uniform = torch.tensor([-1.0, -0.0, 1.0, math.inf, math.nan])
    assert emulator.draw_codes(logits, uniform).tolist() == [1, 1, 4, 4, 4]
    assert emulator.draw_codes(logits, uniform, top_k=3).tolist() == [1, 1, 3, 3, 3]


def test_zero_draws_the_first_code_that_has_any_probability(emulator):
    """In float64, as the reference has it."""
    logits = torch.tensor([[-1e4, -700.0, -40.0, 0.0], [-3e38, -800.0, 0.0, -1.0]])
    assert emulator.draw_codes(logits, torch.zeros(2)).tolist() == [1, 2]
    assert draw_codes_reference(filter_logits_reference(logits), torch.zeros(2)).tolist() == [1, 2]


@pytest.mark.parametrize("cluster", [1, 4])
def test_the_likeliest(emulator, cluster):
    """The first of equals for the number 0; others draw among them, as far as top-p leaves them."""
    logits = torch.randn(4, 500, generator=torch.Generator().manual_seed(1))
    logits[0, 499], logits[1, 0], logits[2, [31, 32, 400]], logits[3] = 9.0, 9.0, 9.0, -2.0
    zeros, thirds = torch.zeros(4), torch.tensor([0.5, 0.5, 0.5, 0.5])
    for top_p in (1.0, 0.5):
        assert emulator.draw_codes(logits, zeros, cluster, top_k=1, top_p=top_p).tolist() == [499, 0, 31, 0]
    assert emulator.draw_codes(logits, thirds, cluster, top_k=1).tolist() == [499, 0, 32, 250]
    assert emulator.draw_codes(logits, thirds, cluster, top_k=1, top_p=0.5).tolist() == [499, 0, 32, 125]


@pytest.mark.parametrize("cluster", [1, 2])
def test_ties_at_the_nucleus_edge_stay_by_index(emulator, cluster):
    logits = torch.zeros(4, 1000)
    logits[1::2, 500:] = 1.0
    logits[1::2, ::7] = -math.inf
    for top_p in (1e-9, 0.1, 0.55, 0.999):
        assert_drawn(emulator, logits, numbers(4), cluster, top_p=top_p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_guidance_and_strides(emulator, dtype):
    """Rows that begin anywhere, and rows of which one load brings four codes: the same codes."""
    logits, guidance = guided_rows(dtype)
    logits[:, 3] = guidance["uncond"][:, 3] = -math.inf
    settings = {"temperature": 0.8, "top_k": 200, "top_p": 0.9}
    assert_drawn(emulator, logits, numbers(6), 2, **guidance, **settings)
    padded = {name: torch.full((6, 1024), -math.inf, dtype=dtype) for name in ("logits", "uncond")}
    padded["logits"][:, :999], padded["uncond"][:, :999] = logits, guidance["uncond"]
    again = emulator.draw_codes(**padded, uniform=numbers(6), cfg_scale=guidance["cfg_scale"], **settings)
    assert torch.equal(again, emulator.draw_codes(logits, numbers(6), **guidance, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_begin_anywhere(emulator, dtype):
    """As many codes as fours have, at addresses that one load could not read, of logits or of their guidance only."""
    rows = (2 * torch.randn(2, 3, 1004, generator=torch.Generator().manual_seed(8))).to(dtype)
    scale = torch.full((3,), 1.5)
    for first in range(4):
        logits, uncond = (one[:, first : first + 1000] for one in rows)
        expected = emulator.draw_codes(logits.contiguous(), numbers(3), uncond=uncond.contiguous(), cfg_scale=scale)
        for one, other in [(logits, uncond.contiguous()), (logits.contiguous(), uncond), (logits, uncond)]:
            assert torch.equal(emulator.draw_codes(one, numbers(3), uncond=other, cfg_scale=scale), expected)


@pytest.mark.parametrize("cluster", [0, 1, 4])
def test_keys_in_global_memory(emulator, cluster):
    """Also more rows than places: 9 on the 8 or 2 of 4 multiprocessors."""
    emulator.configure(shared_limit=40 << 10, multiprocessors=4)
    logits = torch.randn(9, 9000, generator=torch.Generator().manual_seed(5))
    assert emulator.draw_scratch(9, 9000, cluster) == (8 * 9024 if cluster < 2 else 2 * 9088) * 4
    assert_drawn(emulator, logits, numbers(9), cluster, top_k=500, top_p=0.9)


def test_blocks_per_row(emulator):
    assert [emulator.draw_cluster(count) for count in (1, 16384, 16385, 65536, 262144)] == [1, 1, 2, 4, 8]
    emulator.configure(clusters=False)
    assert emulator.draw_cluster(262144) == 1


@pytest.mark.parametrize("num_codes", [70_001, 140_000])
def test_many_codes(emulator, num_codes):
    """Three digits of an index; the second size is read four codes at a time."""
    logits = torch.randn(3, num_codes, generator=torch.Generator().manual_seed(6))
    assert_drawn(emulator, logits, numbers(3), 0, top_k=5000, top_p=0.99)
    assert_drawn(emulator, logits, numbers(3), 0)


def test_the_order_of_threads_the_cluster_and_the_batch_do_not_matter(emulator):
    logits = torch.randn(5, 700, generator=torch.Generator().manual_seed(7))
    for settings in ({"top_k": 400, "top_p": 0.95}, {}):
        expected = emulator.draw_codes(logits, numbers(5), 1, **settings)
        for seed, cluster in [(1, 1), (2, 1), (3, 2), (4, 4), (5, 8)]:
            emulator.configure(seed=seed)
            assert torch.equal(emulator.draw_codes(logits, numbers(5), cluster, **settings), expected)
        assert torch.equal(emulator.draw_codes(logits[3:], numbers(5)[3:], **settings), expected[3:])


@pytest.mark.parametrize("width", [70, 72])
@pytest.mark.parametrize("settings", [{}, {"top_k": 1}, {"top_k": 60}, {"top_p": 0.5}])
def test_bad_rows_are_marked_and_leave_others_alone(emulator, width, settings):
    logits = torch.randn(7, width)
    uniform = torch.rand(7)
    good = emulator.draw_codes(logits, uniform, **settings)
    logits[1, width - 1], logits[2, 0], logits[3], logits[4], logits[6, 9] = (
        math.nan, math.inf, -math.inf, -math.inf, -math.nan,
    )  # fmt: skip
    logits[4, 41] = -5.0
    codes = emulator.draw_codes(logits, uniform, **settings)
    assert (codes == -1).nonzero()[:, 0].tolist() == [1, 2, 3, 6]
    assert torch.equal(codes[[0, 5]], good[[0, 5]])
    assert codes[4] == 41


def test_empty_and_refused(emulator):
    assert emulator.draw_codes(torch.zeros(0, 7), torch.zeros(0)).shape == (0,)
    with pytest.raises(RuntimeError, match="status 1"):
        emulator.draw_codes(torch.zeros(1, 7), torch.zeros(1), cluster=3)

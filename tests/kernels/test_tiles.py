"""Kernels give the same with any tile, a program of one token included; which one they have, a table says."""

from types import SimpleNamespace

import pytest
import torch
from tiles import use_tile
from truth import problem

from ddfast import env
from ddfast.ops import (
    add_norm,
    codebook_posterior,
    decode_attention,
    draw_codes,
    filter_logits,
    flow_sample,
    nearest_code,
    norm_linear,
)

pytestmark = pytest.mark.skipif(not env.triton_interpreted(), reason="needs Triton's interpreter")

TILES = [(1, 64), (16, 32), (64, 128)]


@pytest.fixture(params=TILES, ids=str)
def tile(request, monkeypatch) -> tuple[int, int]:
    use_tile(monkeypatch, *request.param)
    return request.param


@pytest.mark.parametrize("dim", [3, 8, 33])
def test_flow(tile, dim):
    rows = 4 if tile[0] == 1 else 17  # a program each, or one more than a tile of 16 has
    log_probs, noise, codebook = (tensor.float() for tensor in problem(rows, 150, dim, support=0.5, seed=5))
    codes, _ = flow_sample(log_probs, noise, codebook, backend="triton")
    assert torch.equal(codes, flow_sample(log_probs, noise, codebook, backend="reference")[0])


def test_tokens_of_a_program_do_not_meet(tile):
    """The codes of some tokens are those of the same tokens among others."""
    log_probs, noise, codebook = (tensor.float() for tensor in problem(5, 150, 8, support=0.5, seed=8))
    together, _ = flow_sample(log_probs, noise, codebook, backend="triton")
    apart, _ = flow_sample(log_probs[3:], noise[3:], codebook, backend="triton")
    assert torch.equal(together[3:], apart)


def test_tiles_follow_from_the_table():
    """From kernel, capability and dimension; no kernel is tuned by time."""
    from ddfast_kernels import codebook_posterior as posterior
    from ddfast_kernels import flow_sample as flow
    from ddfast_kernels import nearest_code as nearest
    from ddfast_kernels import tiles

    kernels = [flow.flow_sample_kernel, nearest.nearest_code_kernel]
    kernels += [posterior.codebook_posterior_kernel, posterior.codebook_posterior_backward_kernel]
    assert all(not hasattr(kernel, "configs") for kernel in kernels)
    for capability in (70, 75, 80, 89, 90, 100, 120):
        for kernel in tiles.TILES:
            for dim in (1, 8, 32, 33, 64, 65, 1000):
                tile = tiles.tile_of(kernel, capability, dim)
                for one in (tile, *tiles.smaller(tile)):
                    assert one.rows == tile.rows and one.codes >= 16 and one.num_warps <= 16
                    assert tiles.constants(one, dim)["DIM"] >= max(dim, 16 if one.rows > 1 else 1)
    # Without tensor cores for float32 a tile's products would spill by the kilobyte.
    assert tiles.tile_of("codebook_posterior", 75, 32).rows == 1 < tiles.tile_of("codebook_posterior", 80, 32).rows


class Kernel:
    """One whose tiles spill as a table says, by (codes, warps), None where Triton does not tell."""

    def __init__(self, words: dict) -> None:
        self.words, self.compiled, self.launched = words, [], []

    def warmup(self, *arguments, grid, **settings):
        self.compiled.append((settings["CODES"], settings["num_warps"]))
        self.arguments = arguments
        return SimpleNamespace(n_spills=self.words.get(self.compiled[-1], 0))

    def __getitem__(self, grid):
        return lambda *_, **settings: self.launched.append((grid, settings["CODES"], settings["num_warps"]))


@pytest.fixture
def table(monkeypatch):
    """The table for a GPU of capability 9.0, with no verdict yet; nothing is interpreted."""
    from ddfast_kernels import tiles

    monkeypatch.setattr(tiles, "EVERY", None)
    monkeypatch.setattr(tiles, "_verdicts", {})
    assert tiles.tile_of("flow_sample", 90, 32) == (16, 32, 4, 2)
    return tiles


@pytest.mark.parametrize(
    ("words", "compiled", "taken"),
    [
        ({}, 1, (32, 4)),
        ({(32, 4): None}, 1, (32, 4)),
        ({(32, 4): 2}, 2, (16, 4)),
        ({(32, 4): 2, (16, 4): 9}, 3, (32, 8)),
        ({(32, 4): 2, (16, 4): 9, (32, 8): 1, (16, 8): 3}, 4, (32, 8)),
        ({(32, 4): 2, (16, 4): 9, (32, 8): 3, (16, 8): 3}, 4, (32, 4)),
    ],
    ids=str,
)
def test_what_spills_has_a_smaller_tile(table, words, compiled, taken):
    """The first that does not, else that of the fewest spills; where a Triton does not tell, the table's."""
    kernel, x = Kernel(words), torch.zeros(40, 32)
    for _ in range(3):
        table.launch("flow_sample", kernel, x, (x, 40, 0.5), GUIDED=True)
    assert len(kernel.compiled) == compiled  # by the first launch alone
    assert kernel.launched == [((3,), *taken)] * 3
    told = table.remarks()
    assert len(told) == (compiled > 1)
    assert all(f"a tile of 16 x {taken[0]} codes, {taken[1]} warps" in line for line in told)


def test_a_tile_that_does_not_fit_the_gpu_is_one_that_spills(table):
    import triton

    class TooLarge:
        @property
        def run(self):
            raise triton.OutOfResources(200_000, 100_000, "shared memory")

    assert table.spills(TooLarge()) and table.spills(None) is None
    verdict = table.judge(table.Tile(16, 32, 4, 2), lambda tile: 0 if tile.codes == 16 else table.spills(TooLarge()))
    assert verdict.tile == (16, 16, 4, 2) and len(verdict.before) == 1


def test_a_tile_does_not_depend_on_sizes(table):
    """What decides is compiled for the usual alignment, whichever call comes first; types and switches count."""
    kernel = Kernel({(32, 4): 1})
    calls = ((1, torch.float32, True), (70, torch.float32, True), (3, torch.bfloat16, True), (3, torch.bfloat16, False))
    for rows, dtype, guided in calls:
        x = torch.zeros(rows, 32, dtype=dtype)
        table.launch("flow_sample", kernel, x, (x, rows, 0.5), GUIDED=guided)
        assert kernel.arguments == (dtype, 16, 0.5)
    assert kernel.compiled == [(32, 4), (16, 4)] * 3
    assert len(table.remarks()) == 1


@pytest.mark.parametrize("filters", [{"top_k": 40}, {"top_p": 0.9}, {"top_k": 90, "top_p": 0.6}], ids=str)
def test_rows_held_in_registers_or_read_again(monkeypatch, filters):
    """The thresholds are the same bits; equal logits at the edge of either included."""
    from ddfast_kernels import draw_codes as draws
    from ddfast_kernels import filter_logits as filtering

    logits, uncond = torch.randn(2, 6, 150).mul(4).round().div(4).unbind()
    logits[0], uncond[0] = 1.0, 1.0
    settings = {"uncond": uncond, "cfg_scale": 1.5, **filters}
    uniform = torch.rand(6)
    held = (
        filter_logits(logits, **settings, backend="triton"),
        draw_codes(logits, uniform, **settings, backend="triton"),
    )
    monkeypatch.setattr(filtering, "_LONGEST_TILE", 64)
    monkeypatch.setattr(draws, "_PART", 32)
    again = (
        filter_logits(logits, **settings, backend="triton"),
        draw_codes(logits, uniform, **settings, backend="triton"),
    )
    exact = filter_logits(logits, **settings, backend="reference")
    assert torch.equal(held[0] > -torch.inf, again[0] > -torch.inf)
    assert torch.equal(held[0] > -torch.inf, exact > -torch.inf)
    assert torch.allclose(held[0].exp(), exact.exp(), atol=1e-6)
    assert torch.equal(held[1], again[1])


def test_posterior(tile):
    log_probs, x, codebook = (tensor.float() for tensor in problem(10, 100, 8, support=0.5, seed=6))
    grads = []
    for backend in ("triton", "reference"):
        leaf = x.view(2, 5, 8).clone().requires_grad_()
        mean = codebook_posterior(leaf, 0.4, log_probs[:5], codebook, backend=backend)
        grads.append((mean.detach(), *torch.autograd.grad(mean.square().sum(), leaf)))
    assert all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(*grads, strict=True))


def test_nearest(tile):
    if tile[0] == 1:
        pytest.skip("its tiles have 16 rows and more")
    x, codebook = torch.randn(70, 8), torch.randn(300, 8)
    assert torch.equal(nearest_code(x, codebook, backend="triton"), nearest_code(x, codebook, backend="reference"))


@pytest.mark.parametrize("cut", [(4, 1), (8, 3), (64, 5)], ids=str)
@pytest.mark.parametrize("position", [0, 7, 39])
def test_attention(monkeypatch, cut, position):
    """Split or not, with splits that have nothing to see."""
    from ddfast_kernels import decode_attention as kernels

    monkeypatch.setattr(kernels, "cut", lambda *_: kernels.Cut(*cut, num_warps=4))
    qkv, rope, first = torch.randn(2, (6 + 2 * 2) * 24), torch.randn(40, 12, 2), torch.tensor([0, 5])
    cache = torch.randn(2, 2, 2, 40, 24)
    cache[:, :, :, position:] = torch.nan
    results = []
    for backend in ("triton", "reference"):
        keys, values = cache.clone()
        out = decode_attention(qkv, keys, values, torch.tensor([position]), rope=rope, first=first, backend=backend)
        results.append((out, keys[:, :, : position + 1], values[:, :, : position + 1]))
    assert all(torch.allclose(ours, theirs, atol=5e-6) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("tile", [1, 4, 16])
@pytest.mark.parametrize("own_vectors", [False, True])
def test_add_norm(monkeypatch, tile, own_vectors):
    """Positions of a program end where a row does, if rows have vectors of their own."""
    from ddfast_kernels import add_norm as kernels

    monkeypatch.setattr(kernels, "cut", lambda *_: kernels.Cut(tile, num_warps=4))
    x, branch = torch.randn(2, 3, 7, 24)
    gate, weight, bias = torch.randn(3, 1, 6, 24).unbind(2)[:3] if own_vectors else torch.randn(3, 24)
    results = [
        add_norm(x, branch, gate=gate, weight=weight, bias=bias, eps=1e-5, backend=backend)
        for backend in ("triton", "reference")
    ]
    assert all(torch.allclose(ours, theirs, atol=5e-6) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("cut", [(8, 32, 1), (16, 64, 2), (32, 32, 4)], ids=str)
@pytest.mark.parametrize("activation", ["none", "swiglu"])
def test_norm_linear(monkeypatch, cut, activation):
    """Widths of several pieces and of less than one."""
    from ddfast_kernels import norm_linear as kernels

    monkeypatch.setattr(kernels, "cut", lambda *_: kernels.Cut(*cut))
    for width in (24, 300):
        x, branch = torch.randn(2, 2, 3, width)
        linear, bias = torch.randn(20, width) / width**0.5, torch.randn(20)
        for front in ({"eps": 1e-5}, {"eps": None}):
            given = (x, None if front["eps"] is None else branch, linear, bias)
            results = [
                norm_linear(*given, **front, activation=activation, backend=backend)
                for backend in ("triton", "reference")
            ]
            assert all(torch.allclose(ours, theirs, atol=5e-6) for ours, theirs in zip(*results, strict=True))


def test_tiles_of_norm_linear():
    """Every multiprocessor has some outputs, and from one to four programs if there are enough."""
    from ddfast_kernels import norm_linear as kernels

    assert kernels.cut(1024, 3072, 1, 2, True, 132) == (8, 128, 4)
    assert kernels.cut(1024, 2816, 2, 2, True, 132) == (8, 128, 4)
    assert kernels.cut(1024, 1024, 1, 2, False, 132) == (8, 128, 8)
    assert kernels.cut(2816, 1024, 1, 2, False, 132) == (8, 128, 8)
    assert kernels.cut(1024, 16384, 1, 2, False, 132) == (32, 64, 4)
    assert kernels.cut(64, 192, 1, 4, True, 132) == (8, 256, 1)
    assert [kernels.slots(rows, 2) for rows in (1, 2, 3, 5, 8)] == [2, 2, 4, 8, 8]
    assert [kernels.slots(rows, 4) for rows in (1, 8)] == [8, 8]
    assert kernels.stages(kernels.Cut(8, 128, 4), 1024, 2, 2, 1, 2) == 3
    assert kernels.stages(kernels.Cut(8, 128, 8), 1024, 2, 1, 1, 2) == 2


def test_tiles_of_add_norm():
    """Powers of two within a row, several only where every multiprocessor still has four programs."""
    from ddfast_kernels import add_norm as kernels

    assert kernels.cut(2, 1, 1024, 132) == (1, 4)
    assert kernels.cut(2 * 256, 256, 1024, 132) == (1, 4)
    assert kernels.cut(128 * 256, 256, 1024, 132) == (4, 4)
    assert kernels.cut(128 * 3, 3, 64, 8) == (2, 1)
    assert kernels.cut(10**6, 10**6, 64, 132) == (64, 4)
    assert kernels.cut(10**6, 10**6, 5000, 132) == (1, 32)

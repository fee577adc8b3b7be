"""Speculative Jacobi decoding against exact joint distributions, and with a cache against without."""

from collections.abc import Callable

import pytest
import torch
from official import llamagen_teacher_like, var_teacher_like
from torch import Tensor

from ddfast.evaluation import speculative_jacobi as module
from ddfast.evaluation.quality import Evaluator
from ddfast.evaluation.sources import sample, sources_for
from ddfast.evaluation.speculative_jacobi import speculative_jacobi, usual_window
from ddfast.models.autoregressive import SamplingDefaults
from ddfast.models.protocol import Teacher
from ddfast.models.toy import ToyTeacher
from ddfast.models.transformer import TransformerTeacher
from ddfast.recipes import get_recipe

SAMPLES = {"toy": 50_000, "cached": 20_000}
"""By the kind of teacher: several of each of the toy's 4,096 sequences, many of the transformer's 256."""

FILTERED = SamplingDefaults(cfg_scale=2.0, temperature=1.3, top_k=6, top_p=0.9)


class GuidedToy(ToyTeacher):
    """Without its condition, tokens are independent; later tokens are guided less."""

    def logits(self, condition: Tensor, codes: Tensor, *, unconditional: bool = False) -> Tensor:
        return self.bias.expand(len(codes), -1, -1) if unconditional else super().logits(condition, codes)

    def group_cfg_scale(self, cfg_scale: float, group: int) -> float:
        return 1 + (cfg_scale - 1) / (1 + group)


def transformer(
    kind: type[TransformerTeacher] = TransformerTeacher, *, num_codes: int = 4, tokens: int = 4, **defaults: float
) -> TransformerTeacher:
    torch.manual_seed(0)
    sizes = {"width": 16, "depth": 2, "heads": 2}
    settings = SamplingDefaults(**defaults)
    codebook, groups = torch.randn(num_codes, 3), (1,) * tokens
    teacher = kind(codebook=codebook, groups=groups, num_classes=3, defaults=settings, **sizes)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return teacher.eval().requires_grad_(False)


class Fading(TransformerTeacher):
    """Later tokens are guided less."""

    group_cfg_scale = GuidedToy.group_cfg_scale


def toy(*, guided: bool = False) -> ToyTeacher:
    teacher = GuidedToy() if guided else ToyTeacher()
    teacher.defaults = FILTERED if guided else teacher.defaults
    return teacher


EXACT: dict[str, Callable[[], Teacher]] = {
    "toy": toy,
    "toy, guided and filtered": lambda: toy(guided=True),
    "cached": transformer,
    "cached, guided and filtered": lambda: transformer(cfg_scale=2.0, temperature=1.3, top_k=3, top_p=0.95),
    "cached, guided less and less": lambda: transformer(Fading, cfg_scale=3.0),
}


def chance(count: int, seed: int = 0) -> Callable[[int, int], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda turn, numbers: torch.rand(count, numbers, generator=generator)


def excess(teacher: Teacher, codes: Tensor) -> float:
    """By how many standard deviations the chi-square statistic of codes [B, N] is above what the exact joint gives."""
    digits = torch.arange(teacher.num_codes).expand(teacher.num_tokens, -1)
    sequences = torch.cartesian_prod(*digits)
    condition = torch.zeros(len(sequences), dtype=torch.int64)
    log_probs = teacher.log_probs(condition, sequences).double().gather(-1, sequences[..., None]).sum((1, 2))
    expected = len(codes) * log_probs.exp()
    assert float(expected.sum()) == pytest.approx(len(codes), rel=1e-5)
    weights = teacher.num_codes ** torch.arange(teacher.num_tokens - 1, -1, -1)
    counts = torch.bincount((codes * weights).sum(-1), minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0  # nothing that the filters leave out
    rare = expected < 5  # all of these in one cell, for which the statistic's normal limit holds too
    expected, counts = (torch.cat((cells[~rare], cells[rare].sum()[None])) for cells in (expected, counts))
    expected, counts = expected[expected > 0], counts[expected > 0]
    freedom = len(expected) - 1
    assert freedom > 20
    return float(((counts - expected).square() / expected).sum() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("window", [1, 2, 16])
@pytest.mark.parametrize("name", EXACT)
def test_the_exact_joint(name, window):
    """Four standard deviations: what sampling noise alone passes in 999 of 1000 runs, and these are one seed."""
    teacher, count = EXACT[name](), SAMPLES[name.partition(",")[0]]
    condition = torch.zeros(count, dtype=torch.int64)
    codes, passes = speculative_jacobi(teacher, condition, chance(count), window=window)
    assert abs(excess(teacher, codes)) < 4
    assert (passes > 1).all() and (passes <= 4).all()
    assert (passes == 4).all() if window == 1 else (passes < 4).any()


def drawn_anew(log_probs: Tensor, drawn_from: Tensor) -> Tensor:
    return log_probs


def kept_as_likely(self, codes: Tensor) -> Tensor:
    return torch.ones(codes.shape)


@pytest.mark.parametrize(
    ("place", "name", "rule"),
    [(module, "left_over", drawn_anew), (module._Drawn, "probability", kept_as_likely)],
    ids=["a rejected token is drawn from p", "a draft is kept with probability p"],
)
def test_another_rule_is_noticed(monkeypatch, place, name, rule):
    monkeypatch.setattr(place, name, rule)
    teacher, count = toy(), SAMPLES["toy"]
    codes, _ = speculative_jacobi(teacher, torch.zeros(count, dtype=torch.int64), chance(count))
    assert excess(teacher, codes) > 20


CAPTION = (
    torch.randn(4, 6, 12, generator=torch.Generator().manual_seed(0)),
    torch.arange(6) >= torch.tensor([[0], [2], [0], [5]]),
)
LABELS = torch.tensor([0, 1, 2, 0])
TEACHERS: dict[str, Callable] = {
    "transformer": lambda: (transformer(num_codes=11, tokens=9, cfg_scale=1.5), LABELS),
    "guided less and less": lambda: (transformer(Fading, num_codes=11, tokens=9, cfg_scale=3.0), LABELS),
    "unguided": lambda: (transformer(num_codes=11, tokens=9), LABELS),
    "LlamaGen": lambda: (llamagen_teacher_like(), LABELS),
    "grouped-query": lambda: (llamagen_teacher_like(n_kv_head=2), LABELS),
    "captions": lambda: (llamagen_teacher_like(model_type="t2i", cls_token_num=6), CAPTION),
}  # fmt: skip


@pytest.mark.parametrize("name", TEACHERS)
def test_with_a_cache_as_without(name, monkeypatch):
    """Whatever memory the cache was given, and wherever each row is."""
    teacher, condition = TEACHERS[name]()
    begin = type(teacher).begin

    def in_used_memory(self, *given, **more):
        state = begin(self, *given, **more)
        for tensor in (*state.cache.keys, *state.cache.values):
            tensor.fill_(float("nan"))
        return state

    monkeypatch.setattr(type(teacher), "begin", in_used_memory)
    for window in (2, 4, 16):
        own, forced = (
            speculative_jacobi(teacher, condition, chance(4), window=window, cached=cached) for cached in (True, False)
        )
        assert torch.equal(own[0], forced[0]) and torch.equal(own[1], forced[1])
    assert len(own[0].unique(dim=0)) == 4


@pytest.mark.parametrize("name", TEACHERS)
def test_a_window_of_one_is_ordinary_decoding(name):
    teacher, condition = TEACHERS[name]()
    uniform = torch.rand(4, 9, generator=torch.Generator().manual_seed(0))

    def by_token(turn: int, numbers: int) -> Tensor:
        return uniform[:, [turn] * numbers]

    codes, passes = speculative_jacobi(teacher, condition, by_token, window=1)
    assert torch.equal(codes, teacher.generate(condition, uniform=uniform))
    assert passes.tolist() == [9] * 4


def test_a_row_goes_on_at_its_own_pace():
    """In a batch as alone, up to the rounding of products."""
    teacher, numbers = (
        transformer(num_codes=11, tokens=9),
        torch.rand(10, 6, 20, generator=torch.Generator().manual_seed(0)),
    )
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    codes, passes = speculative_jacobi(teacher, labels, lambda turn, count: numbers[turn, :, :count], window=4)
    assert len(passes.unique()) > 1
    for row in range(6):
        alone = speculative_jacobi(
            teacher, labels[row : row + 1], lambda turn, count, row=row: numbers[turn, row : row + 1, :count], window=4
        )
        assert torch.equal(alone[0][0], codes[row]) and alone[1][0] == passes[row]


def test_what_depends_on_nothing_before_it_is_kept():
    """A window of four draws is confirmed by the next pass, whose last token is its own: 1 + 8 passes or so, not 24."""
    teacher = ToyTeacher(num_codes=64, num_tokens=24, strength=0.0)
    _, passes = speculative_jacobi(teacher, torch.zeros(500, dtype=torch.int64), chance(500), window=4)
    assert passes.double().mean() < 13


def test_as_a_source():
    teacher, config = ToyTeacher(), get_recipe("digits")
    config.evaluation.samples = 400
    made = sample("speculative_jacobi", teacher, count=400, seed=3)
    figures = Evaluator(config, teacher).measure(made)
    assert figures["passes"] == pytest.approx(float(made.passes.double().mean()))
    assert figures["accepted_per_pass"] == pytest.approx(4 / figures["passes"])
    assert 1 < figures["accepted_per_pass"] < 4
    assert "passes" not in Evaluator(config, teacher).measure(sample("teacher", teacher, count=400, seed=3))
    assert "speculative_jacobi" in [source.name for source in sources_for(teacher)]


def test_groups_of_many_tokens_are_left_out():
    teacher = var_teacher_like()
    assert "speculative_jacobi" not in [source.name for source in sources_for(teacher)]
    with pytest.raises(ValueError, match="teacher: got groups of 9 tokens, expected one token per group"):
        speculative_jacobi(teacher, LABELS, chance(4))


@pytest.mark.parametrize(("count", "window"), [(1, 1), (2, 1), (4, 2), (16, 6), (48, 16), (256, 16)])
def test_the_usual_window(count, window):
    assert usual_window(count) == window


def test_a_window_that_is_not_told_is_the_usual_one():
    teacher, count = toy(), 50
    condition = torch.zeros(count, dtype=torch.int64)
    asked = [speculative_jacobi(teacher, condition, chance(count), window=window)[1] for window in (None, 2, 3)]
    assert torch.equal(asked[0], asked[1])
    assert not torch.equal(asked[1], asked[2])


def test_errors():
    with pytest.raises(ValueError, match="window: got 0, expected at least 1"):
        speculative_jacobi(ToyTeacher(), torch.zeros(2, dtype=torch.int64), chance(2), window=0)
    with pytest.raises(ValueError, match="condition: got labels 1"):
        speculative_jacobi(ToyTeacher(), torch.ones(2, dtype=torch.int64), chance(2))

import pytest
import torch

from ddfast.models import decoding
from ddfast.models.autoregressive import SamplingDefaults
from ddfast.models.protocol import Teacher
from ddfast.models.toy import ToyTeacher
from ddfast.models.transformer import TransformerTeacher
from ddfast.ops import draw_codes, filter_logits

GROUPS = [(1,) * 7, (1, 2, 4), (2, 2, 3), (7,)]
LABELS = torch.tensor([0, 1, 2, 0])


def teacher(groups: tuple[int, ...] = (1,) * 7, **defaults: float) -> TransformerTeacher:
    torch.manual_seed(0)
    model = TransformerTeacher(
        codebook=torch.randn(11, 3),
        groups=groups,
        num_classes=3,
        width=32,
        depth=2,
        heads=4,
        defaults=SamplingDefaults(**defaults),
    )
    for parameter in model.parameters():  # far from the near-uniform initial distribution
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("groups", GROUPS)
def test_cached_decoding_equals_teacher_forcing(groups):
    model = teacher(groups)
    codes = model.generate(LABELS, sampler="greedy", cfg_scale=1.0)
    assert torch.equal(codes, model.logits(LABELS, codes).argmax(-1))


@pytest.mark.parametrize("groups", GROUPS)
def test_guidance_in_decoding_equals_guided_teacher_forcing(groups):
    model = teacher(groups, cfg_scale=2.0, top_k=5)
    codes = model.generate(LABELS, sampler="greedy")
    guided = filter_logits(
        model.logits(LABELS, codes), uncond=model.logits(LABELS, codes, unconditional=True), cfg_scale=2.0, top_k=5
    )
    assert torch.equal(codes, guided.argmax(-1))
    assert torch.allclose(model.log_probs(LABELS, codes), guided, atol=1e-5)
    assert (model.log_probs(LABELS, codes, filtered=False) > -torch.inf).all()


@pytest.mark.parametrize("groups", GROUPS)
def test_tokens_see_earlier_groups_only(groups):
    model = teacher(groups)
    codes = torch.randint(11, (4, 7))
    level = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups))
    before = model.logits(LABELS, codes)
    for token in range(7):
        changed = codes.clone()
        changed[:, token] = (changed[:, token] + 1) % 11
        moved = (model.logits(LABELS, changed) - before).abs().amax((0, 2)) > 1e-6
        assert not moved[level <= level[token]].any()
        if level[token] < level.max():
            assert moved.any()


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("sampler", ["greedy", "flow"])
def test_prefix_and_stop_continue_the_same_sequence(groups, sampler):
    model = teacher(groups, cfg_scale=1.5)
    noise = torch.randn(4, 7, 3) if sampler == "flow" else None
    whole = model.generate(LABELS, sampler=sampler, noise=noise)
    for start in model.group_starts():
        head = model.generate(LABELS, sampler=sampler, noise=noise, stop=start)
        assert torch.equal(head, whole[:, :start])
        assert torch.equal(model.generate(LABELS, sampler=sampler, noise=noise, prefix=head), whole)


def test_flow_and_multinomial_have_the_teachers_distribution():
    """Joint frequencies of the enumerable teacher: both samplers at the sampling-noise floor."""
    toy = ToyTeacher()
    condition = torch.zeros(50_000, dtype=torch.int64)
    drawn = toy.total_variation(toy.generate(condition, generator=torch.Generator().manual_seed(1)))
    noise = torch.randn(50_000, 4, 2, generator=torch.Generator().manual_seed(2))
    flowed = toy.total_variation(toy.generate(condition, sampler="flow", noise=noise))
    assert abs(flowed - drawn) < 0.005
    assert abs(float(toy.joint().sum()) - 1) < 1e-6


def test_multinomial_follows_its_generator():
    model = teacher()
    first, second, other = (model.generate(LABELS, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_cfg_interval_leaves_late_groups_unguided():
    model = teacher(cfg_scale=3.0)
    guided = model.generate(LABELS, sampler="greedy")
    early = model.generate(LABELS, sampler="greedy", cfg_interval=1)
    plain = model.generate(LABELS, sampler="greedy", cfg_interval=1, prefix=early[:, :3], cfg_scale=1.0)
    assert torch.equal(early[:, :3], guided[:, :3])
    assert torch.equal(early, plain)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sampler": "beam"}, "sampler: got 'beam'"),
        ({"sampler": "flow"}, "noise: got None"),
        ({"noise": torch.randn(4, 7, 3)}, "noise: got a tensor"),
        ({"sampler": "flow", "noise": torch.randn(4, 6, 3)}, r"noise: got shape \[4, 6, 3\], expected \[4, 7, 3\]"),
        ({"prefix": torch.zeros(3, 2, dtype=torch.int64)}, r"prefix: got shape \[3, 2\]"),
        ({"stop": 9}, "stop: got 9"),
        ({"prefix": torch.zeros(4, 3, dtype=torch.int64), "stop": 1}, "stop: got 1, expected at least"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
    ],
)
def test_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        teacher().generate(LABELS, **arguments)


def test_labels_are_checked():
    with pytest.raises(ValueError, match=r"condition: got labels 0\.\.3, expected 0\.\.2"):
        teacher().generate(torch.tensor([0, 3]))
    with pytest.raises(TypeError, match=r"condition: got torch\.float32"):
        teacher().generate(torch.ones(2))


def test_a_marked_code_is_an_error(monkeypatch):
    """As a GPU's kernel returns it, which cannot raise by itself."""
    teacher = ToyTeacher()
    marked = torch.tensor([[3], [-1]])
    monkeypatch.setattr(decoding, "only_codes", lambda *_, **__: marked)
    with pytest.raises(ValueError, match="token 0 of image 1 has no code"):
        teacher.generate(torch.zeros(2, dtype=torch.int64), sampler="flow", noise=torch.randn(2, 4, 2))


@pytest.mark.parametrize("scale", [0.5, 1.5, 4.0])
def test_guiding_hidden_states_is_guiding_logits(monkeypatch, scale):
    """The head is linear: the same distribution, up to rounding, and half of the head's rows."""
    model, seen, rows = teacher((1, 2, 4)), [], []

    def spy(logits, uniform, **arguments):
        seen.append(filter_logits(logits, **{**arguments, "top_k": 0}))
        return draw_codes(logits, uniform, **arguments)

    monkeypatch.setattr(decoding, "draw_codes", spy)
    model.head.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    folded = model.generate(LABELS, sampler="greedy", cfg_scale=scale)
    whole = type("Whole", (type(model),), {"read_out": Teacher.read_out})
    advance = type(model).advance
    monkeypatch.setattr(whole, "advance", lambda self, *arguments: self.head(advance(self, *arguments)))
    model.__class__ = whole
    count = len(seen)
    assert torch.equal(model.generate(LABELS, sampler="greedy", cfg_scale=scale), folded)
    assert rows == [len(LABELS)] * count + [2 * len(LABELS)] * count
    for ours, plain in zip(seen[:count], seen[count:], strict=True):
        assert torch.allclose(ours, plain, atol=1e-4)

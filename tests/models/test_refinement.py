"""Passes of the teacher over guessed codes end at its own flow sample, and get there as they promise."""

import itertools

import pytest
import torch
from official import llamagen_teacher_like, var_teacher_like
from small import build

from ddfast.models import refinement
from ddfast.models.autoregressive import SamplingDefaults, take
from ddfast.models.flow_network import TransformerFlowNetwork
from ddfast.models.refinement import refined
from ddfast.models.windows import Windows
from ddfast.ops import nearest_code

GUIDED = {"cfg_scale": 2.5, "temperature": 1.2, "top_k": 7, "top_p": 0.9}
SETTINGS = {"as they are": {}, "guided and filtered": GUIDED, "guided at first": {**GUIDED, "cfg_interval": 2}}


def text_teacher():
    return llamagen_teacher_like(model_type="t2i", cls_token_num=6)


TEACHERS = {
    "one by one": lambda: build((1,) * 9, trained=True)[0],
    "groups": lambda: build((1, 3, 2), trained=True)[0],
    "llamagen": llamagen_teacher_like,
    "llamagen, text": text_teacher,
    "var": var_teacher_like,
}


def given(teacher, batch=12):
    """A condition of so many samples, their noise, and codes that have nothing to do with either."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch, teacher.num_tokens, teacher.code_dim, generator=generator)
    codes = torch.randint(teacher.num_codes, (batch, teacher.num_tokens), generator=generator)
    if teacher.num_classes:
        return torch.arange(batch) % teacher.num_classes, noise, codes
    sizes = teacher.sizes
    features = torch.randn(batch, sizes.cls_token_num, sizes.caption_dim, generator=generator)
    valid = torch.arange(sizes.cls_token_num) >= torch.arange(batch)[:, None] % 4  # padded at the left
    return (features * valid[..., None], valid.long()), noise, codes


@pytest.mark.parametrize("cached", [None, False])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", TEACHERS)
def test_exact_is_what_the_teacher_makes(name, settings, cached):
    teacher = TEACHERS[name]()
    condition, noise, codes = given(teacher)
    own = teacher.generate(condition, sampler="flow", noise=noise, **settings)
    found, passes = refined(teacher, condition, noise, codes, "exact", cached=cached, **settings)
    assert torch.equal(found, own)
    assert (passes >= 1).all() and (passes <= len(teacher.groups)).all()
    again, passes = refined(teacher, condition, noise, own, "exact", cached=cached, **settings)
    assert torch.equal(again, own) and (passes == 1).all()  # one pass sees that nothing changes


@pytest.mark.parametrize("window", [1, 2, 4, 100])
@pytest.mark.parametrize("name", TEACHERS)
def test_windows(name, window):
    teacher = TEACHERS[name]()
    condition, noise, codes = given(teacher)
    found, passes = refined(teacher, condition, noise, codes, "exact", window=window)
    assert torch.equal(found, teacher.generate(condition, sampler="flow", noise=noise))
    assert window > 1 or (passes == teacher.num_tokens).all()


@pytest.mark.parametrize("name", TEACHERS)
def test_every_pass_makes_a_group_final_and_is_one_map_of_the_last(name):
    teacher = TEACHERS[name]()
    condition, noise, codes = given(teacher)
    own, starts = teacher.generate(condition, sampler="flow", noise=noise), teacher.group_starts()
    by_steps = codes
    for turn, start in enumerate(starts[1:], 1):
        found, passes = refined(teacher, condition, noise, codes, turn)
        by_steps = refined(teacher, condition, noise, by_steps, 1)[0]
        assert torch.equal(found, by_steps)
        assert torch.equal(found[:, :start], own[:, :start])
        assert (passes <= turn).all()
    assert torch.equal(refined(teacher, condition, noise, codes, 0)[0], codes)


@pytest.mark.parametrize("cached", [None, False])
@pytest.mark.parametrize("name", ["one by one", "llamagen", "llamagen, text"])
def test_rows_that_are_done_leave(name, cached, monkeypatch):
    teacher = TEACHERS[name]()
    condition, noise, codes = given(teacher)
    codes[::2] = teacher.generate(condition, sampler="flow", noise=noise)[::2]
    alone = [
        refined(teacher, take(condition, row), noise[row], codes[row], "exact", cached=cached)
        for row in torch.arange(len(noise)).split(1)
    ]
    sizes = []
    for kind in Windows.__subclasses__():

        def seen(self, before, first, size, kind=kind, window=kind.window):
            sizes.append((len(before), size))
            return window(self, before, first, size)

        monkeypatch.setattr(kind, "window", seen)
    found, passes = refined(teacher, condition, noise, codes, "exact", cached=cached)
    assert torch.equal(found, torch.cat([part for part, _ in alone]))
    assert torch.equal(passes, torch.cat([part for _, part in alone]))
    assert sizes[0] == (12, teacher.num_tokens) and sizes[1][0] <= 9
    assert all(later[0] <= before[0] and later[1] <= before[1] for before, later in itertools.pairwise(sizes))


@pytest.mark.parametrize("kind", ["dd1", "dd2"])
@pytest.mark.parametrize("refine", [1, 3, "exact"])
def test_students(kind, refine):
    teacher, student = build((1,) * 9, trained=True)
    if kind == "dd2":
        student = TransformerFlowNetwork.from_teacher(teacher, head_width=8, head_depth=1).eval()
    teacher.defaults = SamplingDefaults(cfg_scale=1.5)
    condition, noise, _ = given(teacher)
    start = nearest_code(student.sample(condition, noise), student.codebook)
    expected = teacher.embed(refined(teacher, condition, noise, start, refine, cfg_scale=3.0, top_k=5)[0])
    assert torch.equal(student.sample(condition, noise, refine=refine, cfg_scale=3.0, top_k=5), expected)
    if refine == "exact":
        own = teacher.generate(condition, sampler="flow", noise=noise)
        assert torch.equal(student.sample(condition, noise, refine="exact"), teacher.embed(own))


def test_rows_that_are_done_and_stay_do_not_change(monkeypatch):
    teacher = build((1,) * 9, trained=True)[0]
    condition, noise, codes = given(teacher)
    monkeypatch.setattr(refinement, "_LEAVE", 0.0)
    assert torch.equal(
        refined(teacher, condition, noise, codes, "exact")[0], teacher.generate(condition, sampler="flow", noise=noise)
    )


@pytest.mark.parametrize(
    "error, what, settings",
    [
        (ValueError, "refine: got -1", {"refine": -1}),
        (ValueError, "refine: got 'all'", {"refine": "all"}),
        (TypeError, "refine: got True", {"refine": True}),
        (TypeError, "refine: got 1.5", {"refine": 1.5}),
        (ValueError, "sampler 'multinomial'", {"refine": 1, "sampler": "multinomial"}),
        (ValueError, "stop: has no effect with refine", {"refine": 1, "stop": 4}),
        (ValueError, "cfg_scale: has no effect without", {"refine": 0, "cfg_scale": 2.0}),
    ],
)
def test_what_is_refused(error, what, settings):
    teacher, student = build((1,) * 4)
    condition, noise, _ = given(teacher, 2)
    with pytest.raises(error, match=what):
        student.sample(condition, noise, **settings)


def test_what_is_refused_of_windows():
    teacher = build((1,) * 4)[0]
    with pytest.raises(ValueError, match="window: got 0"):
        refined(teacher, *given(teacher, 2), "exact", window=0)

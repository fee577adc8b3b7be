"""The plain decoders against the official code's recorded codes, against `Teacher.generate`, and on their own."""

import math

import pytest
import torch
from golden import Case
from official import llamagen_teacher_like, var_teacher_like
from torch.utils._python_dispatch import TorchDispatchMode

from ddfast.evaluation.plain_decoding import plain_decoder
from ddfast.models.autoregressive import SamplingDefaults
from ddfast.models.loading import load_teacher
from ddfast.models.protocol import Teacher
from ddfast.models.toy import ToyTeacher
from ddfast.models.transformer import TransformerTeacher

LLAMAGEN, TEXT, VAR = Case("llamagen_c2i"), Case("llamagen_t2i"), Case("var_teacher")
SIZES = {"n_head": 4, "block_size": 16}
LABELS = torch.tensor([0, 1, 2, 0])


def digits_like(groups: tuple[int, ...] = (1,) * 9) -> TransformerTeacher:
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 2, "heads": 4}
    teacher = TransformerTeacher(codebook=torch.randn(16, 3), groups=groups, num_classes=3, **sizes)
    for parameter in teacher.parameters():
        if parameter.ndim > 1:  # large biases would decide alone
            torch.nn.init.normal_(parameter, std=0.3)
    return teacher.eval().requires_grad_(False)


def captions() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(4, 5, dtype=torch.int64)
    mask[0, :2], mask[1, :4] = 0, 0
    return torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(0)), mask


class NoOpsOfOurs(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        assert op.namespace != "ddfast", op
        return op(*arguments, **(options or {}))


def plain_greedy(teacher: Teacher, condition, **settings) -> torch.Tensor:
    return plain_decoder(teacher).generate(condition, sampler="greedy", **settings)


@pytest.mark.parametrize(
    ("case", "name"),
    [(LLAMAGEN, "gen0"), (LLAMAGEN, "gen2"), (TEXT, "gen0"), (TEXT, "gen1"), (VAR, "gen")],
    ids=["llamagen-guided", "llamagen", "text-guided", "text", "var-guided"],
)
def test_official_codes(case, name):
    """Not through this package's own decoder: what FoundationVision's code decoded greedily from the same weights."""
    if case is VAR:
        teacher, condition = load_teacher(VAR.file("var.pth"), VAR.file("vae.pth")), VAR["gen_label"]
        cfg_scale = VAR.config["inference"]["cfg"]
    else:
        teacher = load_teacher(case.file("gpt.pt"), LLAMAGEN.file("vq.pt"), **SIZES)
        condition = LLAMAGEN["gen_label"] if case is LLAMAGEN else (TEXT["caption"], TEXT["emb_masks"])
        cfg_scale = case.config["gen"][int(name[-1])]["cfg_scale"]
    case.check(**{f"{name}_idx": plain_greedy(teacher, condition, cfg_scale=cfg_scale)})


TEACHERS = {
    "digits": lambda: (digits_like(), LABELS),
    "uncached": lambda: (digits_like((1, 2, 6)), LABELS),
    "llamagen": lambda: (llamagen_teacher_like(), LABELS),
    "grouped-query": lambda: (llamagen_teacher_like(n_kv_head=2), LABELS),
    "text": lambda: (llamagen_teacher_like(model_type="t2i", cls_token_num=5), captions()),
    "var": lambda: (var_teacher_like(), LABELS),
    "var-shared": lambda: (var_teacher_like(shared_aln=True, attn_l2_norm=False), LABELS),
}


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("family", TEACHERS)
def test_the_same_codes_as_generate(family, guided):
    teacher, condition = TEACHERS[family]()
    cfg_scale = 2.5 if guided else 0.0 if family.startswith("var") else 1.0
    codes = plain_greedy(teacher, condition, cfg_scale=cfg_scale)
    assert torch.equal(codes, teacher.generate(condition, sampler="greedy", cfg_scale=cfg_scale))
    assert len(codes.unique(dim=0)) > 1 and len(codes.unique()) > 4  # it depends on condition and position


@pytest.mark.parametrize("family", TEACHERS)
def test_stopping_early(family):
    teacher, condition = TEACHERS[family]()
    stop = teacher.group_starts()[2]
    codes = plain_greedy(teacher, condition, stop=stop)
    assert torch.equal(codes, plain_greedy(teacher, condition)[:, :stop])


@pytest.mark.parametrize("family", [name for name in TEACHERS if name != "uncached"])
def test_it_stands_on_its_own(family, monkeypatch):
    """Nothing of the decoder that it is the baseline of."""
    teacher, condition = TEACHERS[family]()
    expected = teacher.generate(condition, sampler="greedy")

    def never(*_, **__):
        raise AssertionError("the teacher's own code ran")

    for name in ("generate", "begin", "advance", "read_out", "logits"):
        monkeypatch.setattr(type(teacher), name, never)
    for module in teacher.modules():  # the tokenizer, between VAR's scales, is the same for both
        inside = type(module).__module__
        if inside.startswith("ddfast.") and not inside.endswith(("tokenizers", "tokenizer")):
            monkeypatch.setattr(module, "forward", never)
    with NoOpsOfOurs():
        assert torch.equal(plain_greedy(teacher, condition), expected)


def test_the_same_distribution_as_generate():
    toy = ToyTeacher()
    condition = torch.zeros(50_000, dtype=torch.int64)
    plain = plain_decoder(toy).generate(condition, generator=torch.Generator().manual_seed(0))
    cached = toy.generate(condition, generator=torch.Generator().manual_seed(1))
    assert abs(toy.total_variation(plain) - toy.total_variation(cached)) < 0.005  # both at the sampling-noise floor


@pytest.mark.parametrize("family", ["digits", "llamagen", "var"])
def test_filters_and_guidance_in_draws(family):
    """Every code drawn is one that the filters leave, and each of the first group's comes as often as it should."""
    teacher, _ = TEACHERS[family]()
    teacher.defaults = SamplingDefaults(cfg_scale=1.5, temperature=1.3, top_k=6, top_p=0.9)
    condition = torch.ones(10_000, dtype=torch.int64)
    stop = teacher.group_starts()[2]
    codes = plain_decoder(teacher).generate(condition, generator=torch.Generator().manual_seed(0), stop=stop)
    whole = torch.nn.functional.pad(codes, (0, teacher.num_tokens - stop))
    log_probs = teacher.log_probs(condition[:500], whole[:500])[:, :stop]
    assert (log_probs.gather(-1, codes[:500, :, None]) > -math.inf).all()
    frequency = torch.bincount(codes[:, 0], minlength=teacher.num_codes) / len(codes)
    assert (frequency - log_probs[0, 0].exp()).abs().max() < 0.02  # four standard deviations


@pytest.mark.parametrize("family", ["digits", "llamagen", "var"])
def test_the_flow_as_sampler(family):
    teacher, condition = TEACHERS[family]()
    noise = torch.randn(4, teacher.num_tokens, teacher.code_dim, generator=torch.Generator().manual_seed(0))
    plain = plain_decoder(teacher).generate(condition, sampler="flow", noise=noise)
    own = teacher.generate(condition, sampler="flow", noise=noise)
    assert (plain == own).double().mean() > 0.9  # a token at the boundary of two codes may fall to either


@pytest.mark.parametrize("family", ["digits", "llamagen", "text", "var"])
def test_compiled_steps(family, monkeypatch):
    """One graph without a break, whatever the condition; what Inductor makes of it takes minutes."""
    compile = torch.compile
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def traced(function, *, mode, fullgraph, dynamic):
        assert mode == "reduce-overhead" and fullgraph and not dynamic
        return compile(function, fullgraph=True, dynamic=False, backend=backend)

    monkeypatch.setattr(torch, "compile", traced)
    torch.compiler.reset()
    teacher, condition = TEACHERS[family]()
    decoder = plain_decoder(teacher, compile=True)
    other = condition.flip(0) if isinstance(condition, torch.Tensor) else tuple(part.flip(0) for part in condition)
    for given in (other, condition):
        expected = plain_greedy(teacher, given)
        assert torch.equal(decoder.generate(given, sampler="greedy"), expected)
    drawn = decoder.generate(condition)
    assert not torch.equal(drawn, expected)
    assert len(graphs) == (len(teacher.groups) if family == "var" else 1)
    with pytest.raises(ValueError, match="sampler: got 'flow' with compile=True"):
        decoder.generate(condition, sampler="flow", noise=torch.zeros(4, teacher.num_tokens, teacher.code_dim))


@pytest.mark.parametrize("family", ["digits", "llamagen"])
def test_a_compiled_step_draws_from_the_distribution(family, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    teacher, _ = TEACHERS[family]()
    condition = torch.ones(20_000, dtype=torch.int64)
    torch.manual_seed(0)
    codes = plain_decoder(teacher, compile=True).generate(condition, stop=2)
    first = codes[0, 0]
    second = codes[codes[:, 0] == first, 1]
    whole = torch.nn.functional.pad(codes[:1], (0, teacher.num_tokens - 2))
    whole[0, 0] = first
    frequency = torch.bincount(second, minlength=teacher.num_codes) / len(second)
    error = (frequency - teacher.log_probs(condition[:1], whole)[0, 1].exp()).abs().max()
    assert error < 2 / len(second) ** 0.5  # four standard deviations


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stop": 2}, r"stop: got 2 tokens, expected the end of a group: one of \[0, 1, 5, 14\]"),
        ({"sampler": "best"}, "sampler: got 'best'"),
        ({"sampler": "flow"}, "noise: got None with sampler 'flow'"),
        ({"noise": torch.zeros(4, 14, 4)}, "noise: got a tensor with sampler 'multinomial'"),
    ],
)
def test_errors(settings, words):
    with pytest.raises(ValueError, match=words):
        plain_decoder(var_teacher_like()).generate(LABELS, **settings)


def test_what_has_no_decoder_is_not_compiled():
    with pytest.raises(ValueError, match="compile: got True for a ToyTeacher"):
        plain_decoder(ToyTeacher(), compile=True)

import functools

import pytest
import torch
from tiles import use_tile
from torch.utils._python_dispatch import TorchDispatchMode

from ddfast.models.decoding import Decoding, Inputs, Plan
from ddfast.models.transformer import TransformerTeacher
from ddfast.ops import filter_logits, flow_sample, sample_codes


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 60, "top_p": 0.8, "temperature": 1.4}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_filter_then_flow(backend, filters, dtype, interpreted):
    tokens = 3 if interpreted else 100
    logits, uncond = (2 * torch.randn(2, tokens, 300)).to(dtype), torch.randn(2, tokens, 300).to(dtype)
    noise, codebook = torch.randn(2, tokens, 8), torch.randn(300, 8)
    guidance = {"uncond": uncond, "cfg_scale": torch.rand(2, 1) + 1}
    codes, x = sample_codes(logits, noise, codebook, **guidance, **filters, backend=backend)
    log_probs = filter_logits(logits, **guidance, **filters, backend=backend)
    apart, _ = flow_sample(log_probs, noise, codebook, backend=backend)
    assert (codes != apart).sum() <= 1  # log p may differ in its last bits
    assert torch.equal(x, codebook[codes])


@functools.cache
def real_problem() -> tuple[torch.Tensor, ...]:
    """logits, noise, codebook, and the codes that 200 steps in float64 lead to."""
    logits, noise, codebook = 2.5 * torch.randn(8, 16384), torch.randn(8, 8), torch.randn(16384, 8)
    codebook = torch.nn.functional.normalize(codebook, dim=-1)
    codes, _ = sample_codes(logits.double(), noise.double(), codebook.double(), top_k=8000, steps=200)
    return logits, noise, codebook, codes


def test_real_shape(backend, interpreted, monkeypatch):
    logits, noise, codebook, reference = real_problem()
    if interpreted:
        use_tile(monkeypatch, 16, 4096)
        logits, noise, reference = logits[:2], noise[:2], reference[:2]
    codes, _ = sample_codes(logits, noise, codebook, top_k=8000, backend=backend)
    assert (codes != reference).sum() <= 1


def test_empty(backend):
    codes, x = sample_codes(torch.empty(0, 7), torch.empty(0, 4), torch.randn(7, 4), backend=backend)
    assert codes.shape == (0,)
    assert x.shape == (0, 4)


@pytest.mark.parametrize(
    ("logits", "noise", "arguments", "words"),
    [
        (torch.zeros(2, 5), torch.randn(3, 4), {}, r"logits: got shape \(2, 5\), expected \[3, 5\]"),
        (torch.zeros(3, 5), torch.randn(3, 2), {}, "codebook: got shape"),
        (torch.zeros(3, 5), torch.randn(3, 4), {"top_p": -1.0}, "top_p: got -1.0"),
        (torch.full((3, 5), torch.nan), torch.randn(3, 4), {}, "logits: row 0"),
        (torch.zeros(3, 5), torch.full((3, 4), torch.inf), {}, "noise: got NaN or infinite"),
    ],
)
def test_errors(backend, logits, noise, arguments, words):
    with pytest.raises(ValueError, match=words):
        sample_codes(logits, noise, torch.randn(5, 4), **arguments, backend=backend)


class Ops(TorchDispatchMode):
    """The names of all ops that are called; what an op of ours calls itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_of_decoding_looks_no_embedding_up():
    """What follows the flow: a prefix of 0 for bad rows, the codes at their place, and the count."""
    teacher = TransformerTeacher(codebook=torch.randn(11, 3), groups=(1, 1), num_classes=3, width=32, depth=2, heads=4)
    plan = Plan(batch=2, first=0, stop=2, sampler="flow", scales=(1.0, 1.0), filters=(), flow=())
    inputs = Inputs(
        condition=torch.zeros(2, dtype=torch.int64),
        prefix=torch.zeros(2, 0, dtype=torch.int64),
        chance=torch.randn(2, 2, 3),
    )
    with torch.inference_mode():
        decoding = Decoding(teacher.eval(), plan, inputs)
        decoding.start()
        decoding.step(0)
        with Ops() as ops:
            decoding.step(1)
    after = ops.called[ops.called.index("ddfast.sample_codes.default") + 1 :]
    launches = [name for name in after if name not in ("aten.alias.default", "aten.slice.Tensor")]
    assert launches == ["aten.clamp_min.out", "aten.index_copy_.default", "aten.add_.Tensor"]

"""Teachers decoding with the GPU's kernels: on a GPU with and without CUDA graphs, else in Triton's interpreter.

pytest tests/gpu -m gpu
"""

from collections.abc import Callable

import pytest
import torch
from official import llamagen_teacher_like, var_teacher_like
from small import build

from ddfast import env
from ddfast.models.decoding import release_graphs

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (GPU or env.triton_interpreted()), reason="needs a GPU, or Triton's interpreter"),
]

CAPTION = (torch.randn(2, 6, 12), torch.arange(6) >= torch.tensor([[0], [2]]))
TEACHERS: dict[str, Callable] = {
    "one token per group": lambda: (build((1,) * 7, trained=True)[0], torch.tensor([0, 1])),
    "growing groups": lambda: (build((1, 2, 4), trained=True)[0], torch.tensor([0, 1])),
    "LlamaGen": lambda: (llamagen_teacher_like(n_kv_head=2), torch.tensor([1, 4])),
    "LlamaGen, captions": lambda: (llamagen_teacher_like(model_type="t2i", cls_token_num=6), CAPTION),
    "VAR": lambda: (var_teacher_like(), torch.tensor([1, 4])),
}


def there(condition):
    if isinstance(condition, torch.Tensor):
        return condition.to(DEVICE)
    return tuple(part.to(DEVICE) for part in condition)


EVERY = [(name, sampler) for name in TEACHERS for sampler in ("flow", "multinomial", "greedy")]
SOME = [("growing groups", "flow"), ("LlamaGen, captions", "multinomial")]


@pytest.mark.parametrize(("name", "sampler"), EVERY if GPU else SOME)
def test_the_kernels_decode_what_the_references_do(monkeypatch, name, sampler):
    teacher, condition = TEACHERS[name]()
    noise = torch.randn(2, teacher.num_tokens, teacher.code_dim) if sampler == "flow" else None
    settings = {"sampler": sampler, "cfg_scale": 2.5, "top_k": 12}

    def codes(**more) -> torch.Tensor:
        device = teacher.codebook.device
        if sampler == "flow":
            more["noise"] = noise.to(device)
        if sampler == "multinomial":
            more["generator"] = torch.Generator(device).manual_seed(0)
        return teacher.generate(there(condition), **settings, **more).cpu()

    teacher.to(DEVICE)
    monkeypatch.setenv("DDFAST_BACKEND", "reference")
    expected = codes()
    monkeypatch.setenv("DDFAST_BACKEND", "triton")
    assert (codes(graph=False) == expected).float().mean() > 0.95  # a draw may fall on the other side of a boundary
    if not GPU:
        return
    eager = codes(graph=False)
    for _ in range(2):
        assert torch.equal(codes(graph=True), eager)
    middle = teacher.group_starts()[1]
    prefix = there((eager[:, :middle],))[0]
    for more in ({"prefix": prefix}, {"stop": middle}, {"cfg_interval": 1}):
        part = codes(graph=False, **more)
        for _ in range(3):  # without a graph, capturing, replaying
            assert torch.equal(codes(**more), part)
    release_graphs(teacher)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_teacher_forcing_under_autocast(monkeypatch):
    """As DD2's phases without gradient run it: dtypes are mixed."""
    monkeypatch.setenv("DDFAST_BACKEND", "triton")
    for name in ("LlamaGen", "VAR"):
        teacher, condition = TEACHERS[name]()
        teacher, codes = teacher.to(DEVICE), torch.randint(16, (2, teacher.num_tokens), device=DEVICE)
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            assert teacher.logits(there(condition), codes).isfinite().all()


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_with_graphs(monkeypatch, dtype):
    monkeypatch.setenv("DDFAST_BACKEND", "triton")
    for name in ("LlamaGen", "VAR"):
        teacher, condition = TEACHERS[name]()
        teacher = teacher.to(DEVICE)
        for parameter_name, parameter in teacher.named_parameters():
            if not parameter_name.startswith("tokenizer."):
                parameter.data = parameter.data.to(dtype)
        label = there(condition)
        eager = teacher.generate(label, sampler="greedy", graph=False)
        for _ in range(2):
            assert torch.equal(teacher.generate(label, sampler="greedy", graph=True), eager)

"""Every op under torch.library.opcheck and torch.compile(fullgraph=True)."""

import pytest
import torch
from backends import backends_of

import ddfast
from ddfast import ops
from ddfast.ops import dispatch

B, N, V, D = 2, 5, 33, 4


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": normal(B, N, D),
        "codebook": normal(V, D),
        "logits": normal(B, N, V),
        "uncond": normal(B, N, V),
        "log_probs": normal(B, N, V).log_softmax(-1),
        "scale": torch.full((B, N), 1.5),
        "t": torch.rand(B, N, generator=generator) * 0.9 + 0.05,
        "index": torch.arange(B),
        "uniform": torch.rand(B, N, generator=generator),
        "qkv": normal(B, (4 + 2 * 2) * D),
        "keys": normal(B, 2, 7, D),
        "values": normal(B, 2, 7, D),
        "position": torch.tensor([5]),
        "rope": normal(7, D // 2, 2),
        "vectors": normal(B, 1, 3, D),
        "block": normal(B, N, 3, 2, D),
        "matrix": normal(6, D),
        "pair": normal(2, B, 3, D),
    }


def schemas(backend: str) -> dict[str, tuple]:
    a = tensors()
    flow = (a["x"], a["t"], a["log_probs"], a["codebook"])
    vectors = a["vectors"].unbind(2)
    x0_hat, norm = torch.ops.ddfast.codebook_posterior(*flow, backend)
    return {
        "nearest_code": (a["x"], a["codebook"], False, backend),
        "filter_logits": (a["logits"], a["uncond"], a["scale"], 1.0, 7, 0.9, backend),
        "codebook_posterior": (a["x"].clone().requires_grad_(), a["t"], a["log_probs"], a["codebook"], backend),
        "codebook_posterior_backward": (a["x"], *flow, x0_hat, norm, backend),
        "flow_sample": (a["log_probs"], a["x"], a["codebook"], 8, "dpm3m", backend),
        "sample_codes": (a["logits"], None, None, 1.0, 0, 1.0, a["x"], a["codebook"], 8, "dpm3m", backend),
        "draw_codes": (a["logits"], a["uncond"], a["scale"], 1.0, 7, 0.9, a["uniform"], backend),
        "decode_attention": (a["qkv"], a["keys"], a["values"], a["position"], a["rope"], a["index"], 0.5, backend),
        "add_norm": (a["x"], a["x"] + 1, *vectors, 1e-5, False, backend),
        "norm_linear": (*a["pair"], a["matrix"], a["matrix"][:, 0], *vectors, 1e-5, "layer", "swiglu", backend),
        "append_normed": (a["block"], a["keys"], a["values"], 1, a["uniform"][0, :2], backend),
        "activate": (a["x"], a["x"] + 1, "silu", backend),
        "noise": (3, a["index"], [3, 2], backend),
    }


RUNS = [(op, backend) for op in sorted(schemas("auto")) for backend in backends_of(op.removesuffix("_backward"))]


@pytest.mark.parametrize(("op", "run_by"), RUNS)
def test_opcheck(op, run_by):
    torch.library.opcheck(getattr(torch.ops.ddfast, op).default, schemas(run_by)[op])


def strided(value: object) -> object:
    """A tensor with its dimensions in another order in memory, so that what keeps strides is found out."""
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return value
    return value.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_(value.requires_grad)


IN_PLACE = ("decode_attention", "append_normed")
"""Their caches are written to where they are."""


@pytest.mark.parametrize(("op", "run_by"), [run for run in RUNS if run[0] not in IN_PLACE])
def test_results_have_the_strides_that_a_compiler_is_told(op, run_by):
    arguments = tuple(strided(value) for value in schemas(run_by)[op])
    torch.library.opcheck(getattr(torch.ops.ddfast, op).default, arguments)


def attention_and_cache(a: dict[str, torch.Tensor]) -> torch.Tensor:
    keys, values = a["keys"].clone(), a["values"].clone()
    out = ops.decode_attention(a["qkv"], keys, values, a["position"], rope=a["rope"])
    return torch.cat([out.flatten(), keys.flatten(), values.flatten()])


def normed_and_cache(a: dict[str, torch.Tensor]) -> torch.Tensor:
    keys, values = a["keys"].clone(), a["values"].clone()
    # By name, as of others below: on a CPU "auto" does without the op.
    out = ops.append_normed(a["block"], keys, values, 1, scale=a["uniform"][0, :2], backend="reference")
    return torch.cat([out.flatten(), keys.flatten(), values.flatten()])


PUBLIC = {
    "nearest_code": lambda a: ops.nearest_code(a["x"], a["codebook"]),
    "filter_logits": lambda a: ops.filter_logits(a["logits"], uncond=a["uncond"], cfg_scale=1.5, top_k=7, top_p=0.9),
    "codebook_posterior": lambda a: ops.codebook_posterior(a["x"], a["t"], a["log_probs"], a["codebook"]),
    "velocity": lambda a: ops.velocity(a["x"], 0.3, a["log_probs"], a["codebook"]),
    "score": lambda a: ops.score(a["x"], a["t"], a["log_probs"], a["codebook"]),
    "flow_sample": lambda a: ops.flow_sample(a["log_probs"], a["x"], a["codebook"])[1],
    "sample_codes": lambda a: ops.sample_codes(a["logits"], a["x"], a["codebook"], top_k=9)[0],
    "draw_codes": lambda a: ops.draw_codes(a["logits"], a["uniform"], top_k=9, top_p=0.9),
    "decode_attention": attention_and_cache,
    "add_norm": lambda a: ops.add_norm(a["x"], a["x"] + 1, weight=a["x"][0, 0], eps=1e-5, backend="reference")[1],
    "append_normed": normed_and_cache,
    "norm_linear": lambda a: ops.norm_linear(
        a["x"][:, :1], a["x"][:, 1:2], a["matrix"], eps=1e-5, activation="swiglu", backend="reference"
    )[1],
    "activate": lambda a: ops.activate(a["x"], a["x"] + 1, kind="silu", backend="reference"),
    "noise": lambda a: ddfast.noise(3, a["index"], (3, 2)),
}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_compiles_without_a_graph_break(name):
    a = tensors()
    compiled = torch.compile(PUBLIC[name], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a), PUBLIC[name](a))


def test_compiled_gradient_is_the_fused_one():
    a = tensors()
    a["x"].requires_grad_()
    grads = []
    for function in (PUBLIC["codebook_posterior"], torch.compile(PUBLIC["codebook_posterior"], fullgraph=True)):
        (grad,) = torch.autograd.grad(function(a).square().sum(), a["x"])
        grads.append(grad)
    assert torch.allclose(*grads, atol=1e-6)


def test_vmap_in_inference_mode():
    """What calls an op's implementation directly must leave transforms to the dispatcher."""
    logits, uniform = torch.randn(3, 2, 5), torch.rand(3, 2)
    expected = ops.draw_codes(logits, uniform)
    with torch.inference_mode():
        assert torch.equal(ops.draw_codes(logits, uniform), expected)
        assert torch.equal(torch.vmap(ops.draw_codes)(logits, uniform), expected)


def test_every_public_op_is_covered():
    assert {*PUBLIC} == {*ops.__all__}
    assert {*dispatch.KERNELS} == {*ops.__all__} - {"velocity", "score"}

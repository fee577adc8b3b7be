"""What users hand to ops: dtypes in any mixture, changing settings under a compiler, and values that cannot be."""

import math

import pytest
import torch
from backends import backends_of
from torch._dynamo.testing import CompileCounterWithBackend

import ddfast
from ddfast import ops
from ddfast.ops.geometry import codebook_geometry

B, V, D = 5, 37, 4
SAMPLERS = ("filter_logits", "draw_codes", "sample_codes")
READS = {
    "nearest_code": ("x", "codebook"),
    "filter_logits": ("logits", "uncond"),
    "draw_codes": ("logits", "uncond", "uniform"),
    "sample_codes": ("logits", "uncond", "noise", "codebook"),
    "flow_sample": ("log_probs", "noise", "codebook"),
    "codebook_posterior": ("x", "t", "log_probs", "codebook"),
}


def tensors():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    return {
        "logits": 2 * normal(B, V),
        "uncond": 2 * normal(B, V),
        "noise": normal(B, D),
        "codebook": normal(V, D),
        "uniform": torch.rand(B, generator=generator, dtype=torch.float32),
        "log_probs": normal(B, V).log_softmax(-1),
        "x": normal(B, D),
        "t": torch.rand(B, generator=generator, dtype=torch.float32) * 0.9 + 0.05,
    }


def call(op, a, *, backend, **settings):
    """An op on the tensors of `a`, whichever it takes."""
    guidance = {"uncond": a.get("uncond"), "cfg_scale": settings.pop("cfg_scale", 1.55)}
    calls = {
        "nearest_code": lambda: ops.nearest_code(a["x"], a["codebook"], backend=backend),
        "filter_logits": lambda: ops.filter_logits(a["logits"], **guidance, backend=backend, **settings),
        "draw_codes": lambda: ops.draw_codes(a["logits"], a["uniform"], **guidance, backend=backend, **settings),
        "sample_codes": lambda: ops.sample_codes(
            a["logits"], a["noise"], a["codebook"], **guidance, backend=backend, **settings
        )[0],
        "flow_sample": lambda: ops.flow_sample(a["log_probs"], a["noise"], a["codebook"], backend=backend)[0],
        "codebook_posterior": lambda: ops.codebook_posterior(
            a["x"], a["t"], a["log_probs"], a["codebook"], backend=backend
        ),
    }
    return calls[op]()


RUNS = [(op, backend) for op in sorted(READS) for backend in backends_of(op)]


def assert_close(found, expected):
    assert found.shape == expected.shape
    if found.dtype.is_floating_point:
        finite = expected.isfinite()
        assert torch.equal(found.isfinite(), finite)
        torch.testing.assert_close(found[finite].float(), expected[finite].float(), atol=2e-5, rtol=2e-5)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("op", "runs_on", "name"), [(op, by, name) for op, by in RUNS for name in READS[op]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_dtypes(op, runs_on, name, dtype):
    """One input in a reduced precision, the others in float32: every backend computes what the reference does.

    A float32 `uncond` beside bfloat16 logits was rounded: .045 at a scale of 4.
    """
    a = tensors()
    a[name] = a[name].to(dtype)
    exact = {key: value.double() for key, value in a.items()}
    expected = call(op, exact, backend="reference", **({"cfg_scale": 4.0} if op in SAMPLERS else {}))
    found = call(op, a, backend=runs_on, **({"cfg_scale": 4.0} if op in SAMPLERS else {}))
    if op == "codebook_posterior" and name == "x":
        expected = expected.to(dtype)
        torch.testing.assert_close(found.float(), expected.float(), atol=2e-2, rtol=2e-2)
        return
    assert_close(found, expected)


@pytest.mark.parametrize(("op", "runs_on"), RUNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_does_not_matter(op, runs_on, dtype):
    a = tensors()
    expected = call(op, a, backend=runs_on)
    try:
        torch.set_default_dtype(dtype)
        assert torch.equal(call(op, a, backend=runs_on), expected)
        assert ddfast.noise(3, 4, (5,)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS = {
    "temperature": [1.0, 0.7, 1.3, 0.9, 2.0],
    "top_k": [0, 5, 9, 20, 3],
    "top_p": [1.0, 0.9, 0.5, 0.7, 0.3],
    "cfg_scale": [1.0, 2.0, 3.5, 1.5, 4.0],
}


# What a compiler sees is the same for every backend; Triton's interpreter would take minutes.
COMPILED = [backend for backend in backends_of("sample_codes") if backend != "triton"]


@pytest.mark.parametrize("runs_on", COMPILED)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("op", SAMPLERS)
def test_settings_may_change_under_a_compiler(op, name, runs_on):
    torch._dynamo.reset()
    a, counter = tensors(), CompileCounterWithBackend("eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(value):
        return call(op, a, backend=runs_on, **{name: value})

    for value in SETTINGS[name]:
        assert_close(compiled(value), call(op, a, backend=runs_on, **{name: value}))
    assert counter.frame_count <= 3  # the first value, one that stands for every other, and 0 or 1, which are special


@pytest.mark.parametrize("make", [ops.codebook_posterior, ops.velocity, ops.score])
@pytest.mark.parametrize("runs_on", COMPILED)
def test_a_time_may_change_under_a_compiler(make, runs_on):
    torch._dynamo.reset()
    a, counter = tensors(), CompileCounterWithBackend("eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(t):
        return make(a["x"], t, a["log_probs"], a["codebook"], backend=runs_on)

    for t in (0.5, 0.25, 0.9, 0.1, 1.0):
        torch.testing.assert_close(compiled(t), make(a["x"], t, a["log_probs"], a["codebook"], backend=runs_on))
    assert counter.frame_count <= 3


def cache():
    return torch.zeros(B, 2, 7, D, dtype=torch.float32), torch.zeros(B, 2, 7, D, dtype=torch.float32)


SCALARS = {
    "steps": lambda a, n: ops.flow_sample(a["log_probs"], a["noise"], a["codebook"], steps=n)[0],
    "seed": lambda a, n: ddfast.noise(n, torch.arange(3), (2,)),
    "index": lambda a, n: ddfast.noise(3, n, (2,)),
    "start": lambda a, n: ops.append_normed(a["x"][:, None, None, None].expand(-1, 1, 3, 2, -1), *cache(), n % 7),
    "scale": lambda a, n: ops.decode_attention(a["x"].repeat(1, 6), *cache(), torch.tensor([2]), scale=n / 8),
    "eps": lambda a, n: ops.add_norm(a["x"][None], a["x"][None], eps=n / 8)[1],
    "eps, rms": lambda a, n: ops.add_norm(a["x"][None], None, eps=n / 8, rms=True)[1],
    "eps, linear": lambda a, n: ops.norm_linear(a["x"][:, None], None, a["codebook"], eps=n / 8)[1],
    "eps, linear, asked for": lambda a, n: ops.norm_linear(
        a["x"][:, None], None, a["codebook"], eps=n / 8, backend="reference"
    )[1],
    "eps, asked for": lambda a, n: ops.add_norm(a["x"][None], None, eps=n / 8, backend="reference")[1],
}


@pytest.mark.parametrize("name", SCALARS)
def test_every_scalar_may_change_under_a_compiler(name):
    torch._dynamo.reset()
    a, counter = tensors(), CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda n: SCALARS[name](a, n), fullgraph=True, backend=counter)
    for n in range(2, 13):  # more than a compiler tries
        torch.testing.assert_close(compiled(n), SCALARS[name](a, n))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("runs_on", backends_of("flow_sample"))
@pytest.mark.parametrize("how", ["data", "inference", "view", "numpy"])
def test_an_edited_codebook_is_seen(runs_on, how):
    """The version counter misses writes through `.data`, in inference mode, and by NumPy; the codes must not."""
    a = tensors()
    codebook = a["codebook"].clone()
    ops.flow_sample(a["log_probs"], a["noise"], codebook, backend=runs_on)
    before = codebook_geometry(codebook)
    other = 3 * a["codebook"].flip(0) + 1
    if how == "data":
        codebook.data.copy_(other)
    elif how == "inference":
        with torch.inference_mode():
            codebook.copy_(other)
    elif how == "view":
        codebook.data.view(-1).copy_(other.view(-1))
    else:
        codebook.numpy()[:] = other.numpy()
    assert codebook_geometry(codebook) is not before
    found = ops.flow_sample(a["log_probs"], a["noise"], codebook, backend=runs_on)[0]
    assert torch.equal(found, ops.flow_sample(a["log_probs"], a["noise"], other.clone(), backend=runs_on)[0])


@pytest.mark.parametrize(("op", "runs_on"), RUNS)
def test_values_that_cannot_be(op, runs_on):
    for name in READS[op]:
        for value in (math.nan, math.inf):
            a = tensors()
            a[name].view(-1)[2] = value
            with pytest.raises(ValueError, match=name if name != "uncond" else "logits|uncond"):
                call(op, a, backend=runs_on)
        a = tensors()
        a[name] = a[name].long()
        with pytest.raises(TypeError, match=f"{name}: got dtype torch.int64"):
            call(op, a, backend=runs_on)
        a[name] = a[name].tolist()
        with pytest.raises(TypeError, match=f"{name}: got list"):
            call(op, a, backend=runs_on)


@pytest.mark.parametrize(("op", "runs_on"), [run for run in RUNS if run[0] in SAMPLERS])
def test_a_bad_row_is_blamed_on_what_spoils_it(op, runs_on):
    a, scale = tensors(), torch.full((B,), 1.5)
    a["uncond"][3, 5] = math.nan
    with pytest.raises(ValueError, match="uncond: row 3 has NaN"):
        call(op, a, backend=runs_on)
    a, scale[2] = tensors(), math.inf
    with pytest.raises(ValueError, match="cfg_scale: got inf for row 2"):
        call(op, a, backend=runs_on, cfg_scale=scale)
    with pytest.raises(ValueError, match="temperature: got 1e-38, at which row 0 of logits overflows"):
        call(op, {**a, "logits": 1e3 + a["logits"].abs(), "uncond": None}, backend=runs_on, temperature=1e-38)


@pytest.mark.parametrize("runs_on", backends_of("draw_codes"))
@pytest.mark.parametrize("value", [1.0, -0.1, 1.5, math.nan])
def test_uniform_numbers_are_below_one(runs_on, value):
    a = tensors()
    a["uniform"][1] = value
    with pytest.raises(ValueError, match="uniform: got"):
        call("draw_codes", a, backend=runs_on)


@pytest.mark.parametrize("runs_on", backends_of("codebook_posterior"))
@pytest.mark.parametrize("t", [0.0, -0.5, 1.5, math.nan, "0.5", None, True])
def test_times_that_cannot_be(runs_on, t):
    a = tensors()
    for make in (ops.codebook_posterior, ops.velocity, ops.score):
        with pytest.raises((ValueError, TypeError), match="t: got"):
            make(a["x"], t, a["log_probs"], a["codebook"], backend=runs_on)


@pytest.mark.parametrize("op", SAMPLERS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0), ("temperature", math.nan), ("temperature", "1"), ("temperature", True),
        ("top_k", -1), ("top_k", 1.5), ("top_k", True), ("top_k", None),
        ("top_p", 0.0), ("top_p", 1.1), ("top_p", math.nan), ("top_p", "x"),
        ("cfg_scale", math.nan), ("cfg_scale", math.inf), ("cfg_scale", "2"), ("cfg_scale", True),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(op, name, value):
    for backend in backends_of(op):
        with pytest.raises((ValueError, TypeError), match=f"{name}: got"):
            call(op, tensors(), backend=backend, **{name: value})


@pytest.mark.parametrize(("op", "runs_on"), RUNS)
def test_empty_batches(op, runs_on):
    a = {name: value[:0] if name != "codebook" else value for name, value in tensors().items()}
    assert call(op, a, backend=runs_on).shape[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1.5, 0, (2,)), "seed: got float 1.5, expected an integer"),
        ((True, 0, (2,)), "seed: got bool"),
        ((1, True, (2,)), "index: got bool"),
        ((1, 0.5, (2,)), "index: got float"),
        ((1, 0, 2), "shape: got int"),
        ((1, 0, (2.0,)), "shape: got float 2.0, expected an integer"),
    ],
)
def test_noise_is_asked_for_by_integers(arguments, words):
    with pytest.raises(TypeError, match=words):
        ddfast.noise(*arguments)


LAYERS = {
    "add_norm": lambda x, /, **change: ops.add_norm(**{"x": x, "branch": x, "eps": 1e-5, **change}),
    "append_normed": lambda x, /, **change: ops.append_normed(
        **{"qkv": x[:, :, None, None].expand(-1, -1, 3, 2, -1), "keys": cache_of(x), "values": cache_of(x), "start": 0}
        | change
    ),
    "decode_attention": lambda x, /, **change: ops.decode_attention(
        **{"qkv": x.flatten(1)[:, : 6 * D], "keys": cache_of(x), "values": cache_of(x), "position": torch.tensor([2])}
        | change
    ),
    "norm_linear": lambda x, /, **change: ops.norm_linear(
        **{"x": x, "branch": x, "linear": torch.ones(2, D), "eps": 1e-5, **change}
    ),
    "activate": lambda x, /, **change: ops.activate(**{"x": x, "kind": "silu", **change}),
}


def cache_of(x):
    return torch.zeros(len(x), 2, 7, D, dtype=torch.float32)


@pytest.mark.parametrize("op", LAYERS)
def test_empty_batches_of_layers(op):
    for backend in ("auto", *backends_of(op)):
        found = LAYERS[op](torch.zeros(0, 6, D, dtype=torch.float32), backend=backend)
        assert all(len(part) == 0 for part in (found if isinstance(found, tuple) else (found,)))


@pytest.mark.parametrize(
    ("op", "change", "words"),
    [
        ("add_norm", {"x": torch.zeros(2, 6, D).long()}, "x: got dtype torch.int64"),
        ("add_norm", {"branch": [1.0]}, "branch: got list"),
        ("add_norm", {"weight": torch.ones(D).long()}, "weight: got dtype torch.int64"),
        ("add_norm", {"gate": torch.ones(3)}, r"gate: got shape \(3,\)"),
        ("add_norm", {"eps": "1"}, "eps: got str"),
        ("add_norm", {"eps": -1.0}, "eps: got -1.0"),
        ("add_norm", {"eps": math.nan}, "eps: got nan"),
        ("norm_linear", {"linear": torch.ones(2, D).long()}, "linear: got dtype torch.int64"),
        ("norm_linear", {"linear": None}, "linear: got NoneType"),
        ("norm_linear", {"linear_bias": [1.0]}, "linear_bias: got list"),
        ("norm_linear", {"branch": [1.0]}, "branch: got list"),
        ("norm_linear", {"eps": "1"}, "eps: got str"),
        ("norm_linear", {"activation": "relu"}, "activation: got 'relu'"),
        ("append_normed", {"start": 1.0}, "start: got float"),
        ("append_normed", {"start": -1}, "start: got -1"),
        ("append_normed", {"keys": None}, "keys: got NoneType"),
        ("append_normed", {"qkv": torch.zeros(2, 6, 3, 2, D).long()}, "qkv: got dtype torch.int64"),
        ("decode_attention", {"scale": "1"}, "scale: got str"),
        ("decode_attention", {"scale": math.nan}, "scale: got nan"),
        ("decode_attention", {"position": 3}, "position: got int"),
        ("decode_attention", {"values": None}, "values: got NoneType"),
        ("decode_attention", {"first": [0, 0]}, "first: got list"),
        ("activate", {"x": torch.zeros(2, 3).long()}, "x: got dtype torch.int64"),
        ("activate", {"kind": "relu"}, "kind: got 'relu'"),
    ],
)
def test_arguments_of_layers_that_cannot_be(op, change, words):
    for backend in ("auto", "reference"):
        with pytest.raises((ValueError, TypeError), match=words):
            LAYERS[op](torch.zeros(2, 6, D, dtype=torch.float32), backend=backend, **change)

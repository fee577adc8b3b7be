"""Layers with what stands in front of them and behind: step by step, or in one pass where rows are few."""

from functools import partial

import pytest
import torch
from backends import backends_of
from official import llamagen_teacher_like, var_teacher_like
from small import build

from ddfast.models import layers
from ddfast.ops import norm_linear
from ddfast.ops.norm_linear import MOST_ROWS

TEACHERS = {
    "one token per group": lambda: build((1,) * 5, trained=True)[0],
    "LlamaGen": lambda: llamagen_teacher_like(n_kv_head=2),
    "VAR": var_teacher_like,
}


@pytest.fixture
def one_pass(monkeypatch):
    """From its call on, networks take the op for few rows as they would on a GPU; the list has how many, each time."""
    seen = []

    def start(backend):
        def counted(x, *arguments, **settings):
            seen.append(x.shape[0] * x.shape[1])
            return norm_linear(x, *arguments, backend=backend, **settings)

        monkeypatch.setattr(layers, "worth_a_kernel", lambda x: x.shape[0] * x.shape[1] <= MOST_ROWS)
        monkeypatch.setattr(layers, "norm_linear", counted)
        return seen

    return start


@pytest.mark.parametrize("runs_on", backends_of("norm_linear"))
@pytest.mark.parametrize("name", TEACHERS)
def test_a_decoding_is_the_same_in_one_pass(one_pass, name, runs_on):
    """The head reads and gives the same for every group."""
    teacher = TEACHERS[name]().requires_grad_(False)
    labels, logits = torch.tensor([0, 1]), []
    read_out = teacher.read_out
    teacher.read_out = lambda hidden: logits.append(read_out(hidden)) or logits[-1]
    decode = partial(teacher.generate, labels, sampler="greedy", cfg_scale=2.5)
    codes = decode()
    groups, seen = len(logits), one_pass(runs_on)
    assert torch.equal(decode(), codes)
    assert seen
    assert max(seen) <= MOST_ROWS
    for ours, plain in zip(logits[groups:], logits[:groups], strict=True):
        if runs_on == "reference":
            assert torch.equal(ours, plain)
        assert torch.allclose(ours, plain, atol=1e-4)


class Adapted(torch.nn.Module):
    """An adapter in a layer's place, as LoRA's: it has the layer's weight and adds to what that gives."""

    def __init__(self, layer):
        super().__init__()
        self.base, self.weight, self.bias = layer, layer.weight, layer.bias

    def forward(self, x):
        return self.base(x) + 1


class Packed(torch.Tensor):
    """A weight in another form, as quantised ones are."""


def hooked(layer):
    layer.register_forward_hook(lambda module, given, y: y + 1)
    return layer


def hooked_before(layer):
    layer.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    return layer


def offloaded(layer):
    """As accelerate has it: another `forward` on the object, which fetches the weights."""
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 1
    return layer


def packed(layer):
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Packed), requires_grad=False)
    return layer


@pytest.mark.parametrize("change", [hooked, hooked_before, offloaded, packed, Adapted])
def test_one_pass_is_for_the_layer_that_the_network_made(one_pass, change):
    """What watches a layer, adapts it, fetches its weights or packs them is not gone round where rows are few."""
    x, norm = torch.randn(2, 1, 8), {"weight": torch.randn(8), "eps": 1e-5, "rms": True}
    seen, front = one_pass("reference"), torch.randn(6)
    plain = layers.Linear(8, 6)
    layers.norm_layer(x, x, plain, **norm)
    layers.plain_layer(x, plain)
    assert len(seen) == 2
    layer, without = change(plain), change(layers.Linear(8, 6, bias=False))
    total, y = layers.norm_layer(x, x, layer, **norm)
    normed = layers.add_norm_unchecked(x, x, **norm)[1]
    assert torch.equal(total, x + x)
    torch.testing.assert_close(y, layer(normed))
    torch.testing.assert_close(layers.plain_layer(x, layer), layer(x))
    torch.testing.assert_close(layers.norm_layer(x, x, without, layer_bias=front, **norm)[1], without(normed) + front)
    assert len(seen) == 2


def test_a_hook_on_all_modules_is_seen():
    layer = layers.Linear(2, 2)
    assert layers.is_plain(layer)
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert not layers.is_plain(layer)
    assert layers.is_plain(layer)


@pytest.mark.parametrize("activation", ["none", "gelu", "swiglu"])
def test_a_layer_that_was_replaced_is_called(activation):
    """Step by step, a layer is the module that is there: what adapts or watches it has its say."""
    x, norm = torch.randn(2, 1, 8), {"weight": torch.randn(8), "eps": 1e-5, "rms": True}
    layer, called = layers.Linear(8, 6), []
    layer.register_forward_hook(lambda *_: called.append(True))
    total, y = layers.norm_layer(x, x, layer, activation=activation, **norm)
    again = norm_linear(x, x, layer.weight, layer.bias, activation=activation, **norm)
    assert torch.equal(total, again[0])
    assert torch.equal(y, again[1])
    assert layers.plain_layer(x, layer).shape == (2, 1, 6)
    assert len(called) == 2

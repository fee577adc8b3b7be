"""Launches every Triton kernel the way its op does on a GPU that is not there: all that happens before the device runs.

PYTHONPATH=tests/ops python tests/kernels/launch_kernels.py           # a line per op: how many kernels were launched
PYTHONPATH=tests/ops python tests/kernels/launch_kernels.py decoding  # what VAR's decoding compiles, per batch

The driver below stands for CUDA's: arguments are specialised (a 1 becomes a constant, multiples of 16 are noted),
kernels are compiled for sm_90 and loaded nowhere, launches do nothing. In a process of its own, without
TRITON_INTERPRET: that switch decides what `triton.jit` makes of a function.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ddfast_kernels import launch
from tiles import use_tile
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from ddfast import ops
from ddfast.models.decoding import Decoding, Inputs, Plan
from ddfast.models.var.network import VARSizes, VARTeacher
from ddfast.models.var.tokenizer import VARTokenizer
from ddfast.models.vqgan import ConvSizes
from ddfast.ops import dispatch

launched: list[str] = []
loaded: list[str] = []


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name
        # What may begin early knows it, and waits; nothing else does.
        assert metadata.launch_pdl == ("DEPENDENT" in source.fn.arg_names), self.name

    def __call__(self, *_: Any) -> None:
        launched.append(self.name)


def load(name: str, *_: Any) -> tuple[int, ...]:
    """A binary's module, function, registers, spills and most threads."""
    loaded.append(name)
    return 1, 1, 0, 0, 1024


class Driver(DriverBase):
    """CUDA's, as far as a launch asks it."""

    def __init__(self) -> None:
        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": 227 << 10, "multiprocessor_count": 132},
            load_binary=load,
        )

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise AssertionError("a kernel's tile is looked up, not timed")


def report(run: dict[str, Callable[[], Any]], *shape: Any) -> None:
    """Do it; how often each of it launched a kernel."""
    for name, call in run.items():
        before = len(launched)
        call()
        print(name, *shape, len(launched) - before, flush=True)


def every_op(rows: int, num_codes: int, dim: int, dtype: torch.dtype) -> None:
    """All ops on so many rows, codes and coordinates."""
    log_probs, noise = torch.zeros(rows, num_codes, dtype=dtype), torch.zeros(rows, dim)
    codebook, uniform = torch.randn(num_codes, dim), torch.zeros(rows)
    x = torch.zeros(rows, dim, requires_grad=True)
    filters = {"uncond": torch.zeros_like(log_probs), "cfg_scale": 2.0, "top_k": 1, "top_p": 0.9}
    guarded = [{}, filters, {"top_k": num_codes // 2}]
    run = {
        "noise": lambda: ops.noise(1, torch.zeros(rows, dtype=torch.int64), (dim,), backend="triton"),
        "nearest_code": lambda: ops.nearest_code(x.to(dtype), codebook, backend="triton"),
        "filter_logits": lambda: [ops.filter_logits(log_probs, **given, backend="triton") for given in guarded],
        "draw_codes": lambda: [ops.draw_codes(log_probs, uniform, **given, backend="triton") for given in guarded],
        "codebook_posterior": lambda: torch.autograd.grad(
            ops.codebook_posterior(x, 0.5, log_probs, codebook, backend="triton").sum(), x
        ),
        "flow_sample": lambda: [
            ops.flow_sample(log_probs, noise, codebook, steps=steps, solver=solver, backend="triton")
            for steps, solver in ((1, "euler"), (20, "dpm3m"), (16, "heun"))
        ],
        "sample_codes": lambda: [
            ops.sample_codes(log_probs, noise, codebook, **given, backend="triton") for given in guarded
        ],
    }
    report(run, rows, num_codes, dim, dtype)


def every_layer(rows: int, heads: int, dim: int, length: int, dtype: torch.dtype) -> None:
    """The fused layers of a step: one position of a cache of `length`, and `length` positions of a scale."""
    width = heads * dim
    cache, many = torch.zeros(2, rows, heads, length, dim, dtype=dtype), torch.zeros(rows, length, width, dtype=dtype)
    one, rope, vectors = many[:, :1], torch.zeros(length, dim // 2, 2), torch.zeros(rows, 1, 3, width, dtype=dtype)
    qkv, scale = torch.zeros(rows, length, 3, heads, dim, dtype=dtype), torch.ones(heads, dtype=dtype)
    first, position = torch.zeros(rows, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    step, matrix = torch.zeros(rows, 3 * width, dtype=dtype), torch.zeros(2 * width, width, dtype=dtype)
    attention = [{"rope": rope, "first": first}, {"rope": rope}, {}]
    run = {
        "decode_attention": lambda: [
            ops.decode_attention(step, *cache, position, **given, backend="triton") for given in attention
        ],
        "add_norm": lambda: [
            ops.add_norm(x, x, gate=vectors[:, :, 0], weight=vectors[:, :, 1], bias=vectors[:, :, 2], eps=1e-6,
                         backend="triton") for x in (one, many)
        ] + [ops.add_norm(x, x, weight=scale.repeat(dim), eps=1e-5, rms=True, backend="triton") for x in (one, many)],
        "norm_linear": lambda: [
            ops.norm_linear(one, None if given["eps"] is None else one, matrix, matrix[:, 0], **given,
                            activation=activation, backend="triton")
            for activation in ("none", "gelu", "swiglu")
            for given in (
                {"eps": None}, {"eps": 1e-5, "rms": True, "weight": scale.repeat(dim)},
                {"eps": 1e-6, "gate": vectors[:, :, 0], "weight": vectors[:, :, 1], "bias": vectors[:, :, 2]},
            )
        ],
        "append_normed": lambda: [
            ops.append_normed(qkv[:, :1], *cache, 0, scale=scale, backend="triton"),
            ops.append_normed(qkv, *cache, 0, backend="triton"),
        ],
        "activate": lambda: [
            ops.activate(x, times, kind=kind, backend="triton")
            for x in (one, many) for kind, times in (("silu", x), ("gelu", None))
        ] + [ops.activate(*torch.cat((many, many), dim=-1).chunk(2, dim=-1), kind="silu", backend="triton")],
    }  # fmt: skip
    report(run, rows, heads, dim, length, dtype)


@torch.inference_mode()
def var_decoding(batch: int, temperature: float) -> dict[str, int]:
    """How many variants of each kernel a decoding of VAR's ten scales adds, by the flow."""
    torch.manual_seed(0)
    sizes = ConvSizes(channels=32, multipliers=(1, 1), blocks=1, latent_channels=32)
    network = VARSizes(num_classes=5, depth=2, embed_dim=128, num_heads=2)
    teacher = VARTeacher(VARTokenizer(sizes=sizes), network).eval()
    scales = tuple(teacher.group_cfg_scale(2.0, group) for group in range(10))
    filters = (("temperature", temperature), ("top_k", 900), ("top_p", 0.95))
    plan = Plan(batch=batch, first=0, stop=10, sampler="flow", scales=scales, filters=filters, flow=(("steps", 20),))
    inputs = Inputs(
        condition=torch.zeros(batch, dtype=torch.int64),
        prefix=torch.zeros(batch, 0, dtype=torch.int64),
        chance=torch.randn(batch, teacher.num_tokens, 32),
    )
    before = len(loaded)
    Decoding(teacher, plan, inputs).run()
    return dict(Counter(loaded[before:]))


if __name__ == "__main__":
    driver.set_active(Driver())
    launch._driver = lambda: launch._DRIVER_OF_EDGES
    dispatch._obstacle = lambda *_: ""
    torch.Tensor.new_empty, torch.empty = torch.Tensor.new_zeros, torch.zeros  # what a kernel would fill
    if sys.argv[1:] == ["decoding"]:
        os.environ["DDFAST_BACKEND"] = "triton"
        print(json.dumps([var_decoding(1, 1.0), var_decoding(8, 1.0), var_decoding(8, 1)]))
        sys.exit()
    every = {"nearest_code": lambda: ops.nearest_code(torch.zeros(64, 8), torch.zeros(64, 8), backend="triton")}
    report(every, "of the table")
    use_tile(pytest.MonkeyPatch(), 16, 32)
    for sizes in [(1, 1, 1), (3, 17, 33)]:
        every_op(*sizes, torch.float32)
    for sizes in [(1, 1, 2, 1), (1, 2, 64, 1025)]:
        every_layer(*sizes, torch.bfloat16)

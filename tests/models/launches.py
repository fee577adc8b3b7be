"""Counts what a step of decoding launches on a GPU, without one: on tensors of the meta device, taken for CUDA's.

python tests/models/launches.py     # a JSON line per teacher, sampler and guidance

In a process of its own, without TRITON_INTERPRET: that switch decides what `triton.jit` makes of a function. An
operation of PyTorch that computes or copies counts as one launch; an op of ours as what its launcher launches in
Triton, and what it calls before that. Views, and memory that is asked for, launch nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from ddfast.models import attention
from ddfast.models.checkpoint import _Undrawn
from ddfast.models.decoding import Decoding, Inputs, Plan
from ddfast.models.family import network_parameters
from ddfast.models.llamagen.network import LLAMAGEN_SIZES, LlamaGenTeacher
from ddfast.models.llamagen.tokenizer import LlamaGenTokenizer
from ddfast.models.var.network import VARSizes, VARTeacher
from ddfast.models.var.tokenizer import VARTokenizer
from ddfast.ops import dispatch
from ddfast.ops.geometry import CodebookGeometry

TEACHERS: dict[str, Callable[[], Any]] = {
    "LlamaGen-L": lambda: LlamaGenTeacher(LlamaGenTokenizer(), LLAMAGEN_SIZES["L"]),
    "VAR-d16": lambda: VARTeacher(VARTokenizer(), VARSizes()),
}


class Launches(TorchDispatchMode):
    """What is launched, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "ddfast":
            implementation = getattr(importlib.import_module(f"ddfast.ops.{name}"), f"_{name}")
            with self:
                return implementation(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        free = func.is_view or name.startswith(("empty", "new_empty", "_unsafe_view", "lift_fresh"))
        if not free and any(isinstance(one, Tensor) and one.numel() for one in tree_leaves(out)):
            self.counted[name] += 1
        return out


@contextlib.contextmanager
def gpu() -> Iterator[Launches]:
    """Within, tensors are on a GPU that is not there, and Triton's kernels run by default."""
    launches = Launches()

    def known(codebook: Tensor, **_: Any) -> CodebookGeometry:
        """As of a codebook that was looked at before the loop."""
        return CodebookGeometry(codebook[:, 0], 1.0, 0.1, codebook[:, 0], codebook, codebook)

    def launched(kernel: Any, *_: Any, warmup: bool = False, **__: Any) -> None:
        if warmup:  # compiled only, to be looked at
            return
        while hasattr(kernel, "fn"):
            kernel = kernel.fn
        launches.counted[kernel.__name__] += 1

    def attended(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        """Flash attention's result, whose rows lie as the query's."""
        launches.counted["attention"] += 1
        return query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)

    with pytest.MonkeyPatch.context() as patch, launches:
        patch.setattr(Tensor, "is_cuda", property(lambda _: True), raising=False)
        patch.setattr(dispatch, "choose", lambda *_, **__: dispatch.Choice("triton", "as if timed"))
        patch.setattr(attention, "attention", attended)
        patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
        patch.setattr(importlib.import_module("ddfast.ops.flow_sample"), "codebook_geometry", known)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(JITFunction, "run", launched)
        yield launches


def step(name: str, *, batch: int = 1, guided: bool = True, sampler: str = "multinomial") -> Counter[str]:
    """What a step of a teacher launches in bfloat16; of VAR the last scale's, of LlamaGen a token's."""
    with gpu() as launches, torch.device("meta"), torch.inference_mode():
        with _Undrawn():
            teacher = TEACHERS[name]()
        for _, parameter in network_parameters(teacher):
            parameter.data = parameter.data.bfloat16()
        groups = len(teacher.groups)
        plan = Plan(
            batch=batch, first=0, stop=groups, sampler=sampler, scales=(2.0 if guided else 1.0,) * groups,
            filters=(("top_k", 900),), flow=(),
        )  # fmt: skip
        shape = (batch, teacher.num_tokens) + ((teacher.code_dim,) if sampler == "flow" else ())
        inputs = Inputs(
            condition=torch.zeros(batch, dtype=torch.int64), prefix=torch.zeros(batch, 0, dtype=torch.int64),
            chance=torch.zeros(shape),
        )  # fmt: skip
        decoding = Decoding(teacher, plan, inputs)
        decoding.start()
        for group in range(groups):
            launches.counted.clear()
            decoding.step(group)
            if teacher.groups[-1] == 1 and group == 1:
                break
        return launches.counted


if __name__ == "__main__":
    for name in TEACHERS:
        for sampler in ("multinomial", "flow"):
            for guided in (True, False):
                counted = step(name, sampler=sampler, guided=guided)
                case = f"{name}, {sampler}, {'guided' if guided else 'unguided'}"
                print(json.dumps({"case": case, "launches": counted.total(), "of": counted}))

"""Arguments that nobody thought of, for every public op: a case is a number, and what it does is decided by it alone.

    python tests/fuzz/op_cases.py --cases 10000 --seed 0 --op flow_sample

A case takes valid arguments, changes some of them in ways that an op must bear (strides, storage, gradients, dtypes) or
may refuse (shapes, types, devices, values, settings), and calls the op. Either the op refuses in one line that begins
with the argument's name, by a ValueError or a TypeError; or its result has the shape and dtype that its docstring
states and is, within the op's tolerance, that of the float64 reference, and no argument was written to that the
docstring does not call written. Anything else is a finding.

Dimensions: B tokens, V codes, D code dimension, R rows, S sequence, W width, H heads, G key heads, L cache, K head.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import mmap
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddfast import ops
from ddfast.errors import DDFastError
from ddfast.ops import dispatch
from ddfast.ops.flow_sample import MOST_STEPS
from ddfast.ops.tolerance import TOLERANCE

REFUSALS = (ValueError, TypeError, DDFastError)
FLOATS = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65)
Arguments = dict[str, Any]


class Finding(AssertionError):
    """What an op must not do."""


@dataclass
class Case:
    """A call, and what is known of it."""

    op: str
    arguments: Arguments
    changes: list[str] = field(default_factory=list)
    refusable: bool = False  # a change may be refused
    spoilt: list[tuple[str, int]] = field(default_factory=list)  # (argument, row of it that holds an odd value)

    def __str__(self) -> str:
        settings = {name: value for name, value in self.arguments.items() if not isinstance(value, Tensor)}
        tensors = {
            name: f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
            for name, value in self.arguments.items()
            if isinstance(value, Tensor) and not value.is_nested
        }
        return f"{self.op}({tensors} {settings}), changed: {'; '.join(self.changes) or 'nothing'}"


# -- valid arguments ---------------------------------------------------------------------------------------------------


class Draw:
    """What a case's number decides."""

    def __init__(self, number: int | str) -> None:
        self.random = random.Random(number)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(63))

    def of(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def maybe(self, share: float) -> bool:
        return self.random.random() < share

    def size(self) -> int:
        return self.of(*SIZES)

    def lead(self) -> list[int]:
        """Leading dimensions: none, one or two, at times of nothing."""
        return [self.of(0, 1, 2, 3, 5) if self.maybe(0.3) else self.of(1, 2, 3, 5, 9)
                for _ in range(self.of(0, 1, 1, 1, 2))]  # fmt: skip

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float32)

    def dtype(self) -> torch.dtype:
        return self.of(*FLOATS)

    def logits(self, *shape: int) -> Tensor:
        """With ties, and codes that cannot be, but never all of a row."""
        logits = self.of(0.5, 2.0, 6.0) * self.normal(*shape)
        if self.maybe(0.3):
            logits = logits.round()
        if self.maybe(0.4):
            never = self.uniform(*shape) < self.of(0.1, 0.6, 0.95)
            never[..., self.random.randrange(shape[-1])] = False
            logits = logits.masked_fill(never, -math.inf)
        return logits

    def filters(self, *shape: int) -> Arguments:
        """[..., V] -> the settings of `filter_logits`."""
        num_codes, found = shape[-1], {}
        if self.maybe(0.5):
            found["top_k"] = self.of(0, 1, 2, num_codes // 2, num_codes, num_codes + 1)
        if self.maybe(0.5):
            found["top_p"] = self.of(1e-9, 0.1, 0.5, 0.9, 0.999, 1.0)
        if self.maybe(0.4):
            found["temperature"] = self.of(0.25, 0.9, 1.0, 1.7, 4.0)
        if self.maybe(0.4):
            found["uncond"] = self.normal(*shape)  # where logits are -inf, a scale of 0 or less leads nowhere
            found["cfg_scale"] = self.of(
                0.25, 1.0, 1.5, 4, torch.full(shape[:-1], 1.5, dtype=torch.float32), torch.tensor(2.0)
            )
        return found


def nearest_code(draw: Draw) -> Arguments:
    num_codes, dim = draw.of(draw.size(), 4097) if draw.maybe(0.1) else draw.size(), draw.size()
    codebook = draw.normal(num_codes, dim)
    if draw.maybe(0.3):
        codebook[num_codes // 2 :] = codebook[: num_codes - num_codes // 2].clone()
    return {"x": draw.normal(*draw.lead(), dim), "codebook": codebook, "cosine": draw.of(False, True)}


def filter_logits(draw: Draw) -> Arguments:
    shape = [*draw.lead(), draw.of(4097, 300) if draw.maybe(0.1) else draw.size()]
    return {"logits": draw.logits(*shape), **draw.filters(*shape)}


def draw_codes(draw: Draw) -> Arguments:
    found = filter_logits(draw)
    return found | {"uniform": draw.uniform(*found["logits"].shape[:-1])}


def codebook_posterior(draw: Draw) -> Arguments:
    lead, num_codes, dim = draw.lead(), draw.size(), draw.of(1, 3, 4, 8, 16, 17, 32)
    own = lead[draw.random.randrange(len(lead) + 1) :] if draw.maybe(0.3) else lead
    t = draw.of(0.02, 0.5, 1.0, 1, 0.05 + 0.95 * draw.uniform(*lead), torch.tensor(0.3))
    log_probs = draw.logits(*own, num_codes).log_softmax(-1)
    return {"x": draw.normal(*lead, dim), "t": t, "log_probs": log_probs, "codebook": draw.normal(num_codes, dim)}


def flow_sample(draw: Draw) -> Arguments:
    lead, num_codes, dim = draw.lead(), draw.size(), draw.of(1, 2, 4, 8, 9, 16, 32)
    solving = {"steps": draw.of(1, 2, 8, 20), "solver": draw.of("dpm3m", "dpm2m", "heun", "euler")}
    return {
        "log_probs": draw.logits(*lead, num_codes).log_softmax(-1),
        "noise": draw.normal(*lead, dim),
        "codebook": draw.normal(num_codes, dim),
        **(solving if draw.maybe(0.5) else {}),
    }


def sample_codes(draw: Draw) -> Arguments:
    found = flow_sample(draw)
    shape = found.pop("log_probs").shape
    return {"logits": draw.logits(*shape), **found, **draw.filters(*shape)}


def decode_attention(draw: Draw) -> Arguments:
    rows, kv_heads, group, length, dim = draw.of(0, 1, 2, 3), draw.of(1, 2, 3), draw.of(1, 2), draw.size(), draw.size()
    caches = draw.normal(2, rows, kv_heads, length, dim)
    index = draw.random.randrange(length)
    caches[:, :, :, index:] = draw.of(0.0, math.nan)  # of what lies behind the position nothing is read
    found = {
        "qkv": draw.normal(rows, (kv_heads * group + 2 * kv_heads) * dim),
        "keys": caches[0].clone(),
        "values": caches[1].clone(),
        "position": torch.tensor([index], dtype=torch.int64),
    }
    if dim % 2 == 0 and draw.maybe(0.5):
        angle = 6 * draw.uniform(length, dim // 2)
        found["rope"] = torch.stack((angle.cos(), angle.sin()), dim=-1)
    if draw.maybe(0.4):
        found["first"] = torch.tensor([draw.of(0, index, length, -1, 2**62) for _ in range(rows)], dtype=torch.int64)
    if draw.maybe(0.3):
        found["scale"] = draw.of(0.0, 0.5, -1.0, 1)
    return found


def add_norm(draw: Draw) -> Arguments:
    rows, length, width = draw.of(0, 1, 2, 3), draw.of(0, 1, 2, 5), draw.of(8, 16, 33, 64)
    found: Arguments = {"x": draw.normal(rows, length, width), "branch": None, "eps": draw.of(1e-5, 1e-3, 1)}
    if draw.maybe(0.6):
        found["branch"] = draw.normal(rows, length, width)
    for name in ("gate", "weight", "bias"):
        if draw.maybe(0.4):
            found[name] = draw.normal(*draw.of((width,), (rows, 1, width)))
    return found | ({"rms": draw.of(True, False)} if draw.maybe(0.5) else {})


def norm_linear(draw: Draw) -> Arguments:
    found = add_norm(draw)
    outputs, width = draw.of(0, 1, 3, 8), found["x"].shape[2]
    if draw.maybe(0.2):
        found = {"x": found["x"], "branch": None, "eps": None}
    found["activation"] = draw.of("none", "gelu", "swiglu")
    outputs *= 2 if found["activation"] == "swiglu" else 1
    found["linear"] = draw.normal(outputs, width) / math.sqrt(width)
    return found | ({"linear_bias": draw.normal(outputs)} if draw.maybe(0.5) else {})


def append_normed(draw: Draw) -> Arguments:
    rows, length, heads, dim = draw.of(0, 1, 2), draw.of(0, 1, 3), draw.of(0, 1, 2, 3), draw.of(1, 2, 8, 16, 33)
    room = length + draw.of(0, 1, 4)
    found = {
        "qkv": draw.normal(rows, length, 3, heads, dim),
        "keys": torch.full((rows, heads, room, dim), draw.of(0.0, math.nan), dtype=torch.float32),
        "values": torch.full((rows, heads, room, dim), draw.of(0.0, math.nan), dtype=torch.float32),
        "start": draw.random.randrange(room - length + 1),
    }
    return found | ({"scale": draw.uniform(heads)} if draw.maybe(0.5) else {})


def activate(draw: Draw) -> Arguments:
    shape = [*draw.lead(), *([draw.of(0, 300, 5000) if draw.maybe(0.2) else draw.size()] if draw.maybe(0.9) else [])]
    found: Arguments = {"x": 3 * draw.normal(*shape), "kind": draw.of("gelu", "silu")}
    return found | ({"times": draw.normal(*shape)} if draw.maybe(0.5) else {})


def noise(draw: Draw) -> Arguments:
    index = torch.randint(-(2**63), 2**63 - 1, draw.lead(), generator=draw.generator, dtype=torch.int64)
    return {
        "seed": draw.of(0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1),
        "index": draw.of(0, -1, 2**63 - 1, -(2**63), index, index),
        "shape": draw.of((), (1,), (3, 2), [5], torch.Size([4]), (0, 3), (2, 0), (17,)),
    }


# -- what comes out ----------------------------------------------------------------------------------------------------


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def outputs_of(op: str, a: Arguments) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what an op returns, as its docstring has it."""
    if op == "nearest_code":
        return [(a["x"].shape[:-1], torch.int64)]
    if op == "filter_logits":
        return [(a["logits"].shape, wide_dtype(a["logits"], a.get("uncond")))]
    if op == "draw_codes":
        return [(a["logits"].shape[:-1], torch.int64)]
    if op in ("codebook_posterior", "velocity", "score"):
        return [(a["x"].shape, a["x"].dtype)]
    if op in ("flow_sample", "sample_codes"):
        return [(a["noise"].shape[:-1], torch.int64), (a["noise"].shape, a["codebook"].dtype)]
    if op == "decode_attention":
        _, kv_heads, _, dim = a["keys"].shape
        return [((len(a["qkv"]), a["qkv"].shape[1] - 2 * kv_heads * dim), a["qkv"].dtype)]
    if op == "add_norm":
        return [(a["x"].shape, a["x"].dtype)] * 2
    if op == "norm_linear":
        halves = 2 if a["activation"] == "swiglu" else 1
        return [(a["x"].shape, a["x"].dtype), ((*a["x"].shape[:2], len(a["linear"]) // halves), a["x"].dtype)]
    if op == "append_normed":
        rows, length, _, heads, dim = a["qkv"].shape
        return [((rows, heads, length, dim), a["qkv"].dtype)]
    if op == "activate":
        return [(a["x"].shape, a["x"].dtype)]
    lead = a["index"].shape if isinstance(a["index"], Tensor) else ()
    return [((*lead, *a["shape"]), torch.float32)]


LAYERS = ("add_norm", "norm_linear", "append_normed", "decode_attention", "activate")


def mixed(op: str, a: Arguments) -> bool:
    """Whether a layer was given several dtypes, of which it makes what PyTorch's promotion does."""
    dtypes = {value.dtype for name, value in a.items() if is_plain(value) and value.is_floating_point()}
    return op in LAYERS[:3] and len(dtypes) > 1


def exactly(op: str, a: Arguments) -> tuple[list[Tensor], Arguments]:
    """The float64 reference's result and its arguments, of which caches are written."""
    wide = {name: _wide(name, value) for name, value in a.items()}
    return tensors_of(getattr(ops, op)(**wide | ({"backend": "reference"}))), wide


def _wide(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().clone()
    return value.double() if value.is_floating_point() and name != "rope" else value


def tensors_of(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def tolerance(op: str, dtype: torch.dtype) -> float:
    return TOLERANCE.get((op, dtype), 1e-9)


def near(what: str, found: Tensor, exact: Tensor, allowed: Tensor | float) -> None:
    """Alike where the exact result is infinite or none, near it elsewhere."""
    found, exact = found.detach().double(), exact.detach().double()
    most = torch.finfo(torch.float16).max / 4  # what is larger may be infinite in another dtype
    usual = exact.abs() < most
    same = torch.where(exact.isnan(), found.isnan(), torch.where(exact.isinf(), found == exact, True))
    if not bool(same.all()):
        raise Finding(f"{what}: {int((~same).sum())} of {same.numel()} are NaN or infinite in one result only")
    off = torch.where(usual, (found - exact).abs() - allowed, -1.0)
    if off.numel() and not float(off.max()) <= 0:
        raise Finding(f"{what}: beyond the tolerance by {float(off.max()):.3g}")


def compare(case: Case, found: list[Tensor], given: Arguments) -> None:
    """What came out against the float64 reference on `given`, the arguments before the call."""
    op, a = case.op, given
    exact, wide = exactly(op, given)
    rows = sane_rows(case, given)
    if op == "noise":
        if not torch.equal(found[0], exact[0]):
            raise Finding("noise is not the reference's, bit for bit")
    elif op == "nearest_code":
        near_enough(found[0], wide, rows)
    elif op == "filter_logits":
        same_filtered(found[0], given, rows)
    elif op == "draw_codes":
        same_draws(found[0], given, rows)
    elif op in ("flow_sample", "sample_codes"):
        same_codes(op, found, exact[0], given, rows)
    elif op in ("codebook_posterior", "velocity", "score"):
        times = torch.as_tensor(wide["t"], dtype=torch.float64).expand(a["x"].shape[:-1])[..., None]
        size = 1 + a["codebook"].detach().double().abs().max() + a["x"].detach().double().abs()
        allowed = tolerance("codebook_posterior", a["x"].dtype) * size * (1 + 2e-3 / times.square())
        allowed = allowed * math.sqrt(a["x"].shape[-1]) * times ** {"velocity": -1, "score": -2}.get(op, 0)
        near(op, found[0][rows], exact[0][rows], (allowed + tolerance("activate", a["x"].dtype) * exact[0].abs())[rows])
    else:
        dtype = found[0].dtype
        for part, (one, other) in enumerate(zip(found, exact, strict=True)):
            near(f"result {part}", one[rows], other[rows], tolerance(op, dtype) * (1 + other[rows].abs()))
        for name in TABLE[op].written:
            cache = case.arguments[name]
            allowed = max(tolerance(op, dtype), tolerance(op, cache.dtype)) * (1 + wide[name][rows].abs())
            near(name, cache[rows], wide[name][rows], allowed)


def sane_rows(case: Case, given: Arguments) -> Any:
    """An index of the rows whose arguments are all of the ordinary kind; every one of an argument for all has none."""
    if not case.spoilt:
        return ...
    first = given[TABLE[case.op].rows[0]]
    lead = first.shape[: first.dim() - (case.op not in LAYERS)]
    keep = torch.ones(lead[:1], dtype=torch.bool)
    if not lead or any(name not in TABLE[case.op].rows for name, _ in case.spoilt):
        return torch.zeros_like(keep)
    for _, row in case.spoilt:
        keep[row : row + 1] = False
    return keep


def near_enough(codes: Tensor, wide: Arguments, rows: Any) -> None:
    """The distance to the code is the least, within float32's rounding."""
    x, codebook = wide["x"][rows].reshape(-1, wide["x"].shape[-1]), wide["codebook"]
    if wide.get("cosine"):
        codebook = torch.nn.functional.normalize(codebook, dim=-1, eps=1e-300)
        x = torch.nn.functional.normalize(x, dim=-1, eps=1e-300)
    score = codebook.square().sum(-1) / 2 - x @ codebook.T
    excess = score.gather(1, codes[rows].reshape(-1, 1))[:, 0] - score.amin(-1)
    size = x.square().sum(-1) + codebook.square().sum(-1).amax()
    near("distance", excess, torch.zeros_like(excess), 4e-6 * size)


def same_filtered(found: Tensor, given: Arguments, rows: Any) -> None:
    """The codes of the reference in the same precision, but for one whose mass lies within rounding of top_p."""
    exact = ops.filter_logits(**given, backend="reference")
    found, exact = found[rows], exact[rows]
    apart = int(((found > -math.inf) != (exact > -math.inf)).sum(-1).max()) if found.numel() else 0
    if apart > (1 if given.get("top_p", 1.0) < 1 else 0):
        raise Finding(f"{apart} codes of a row are kept by one and not by the other")
    both = (found > -math.inf) & (exact > -math.inf)
    allowed = tolerance("filter_logits", torch.float32) * (1 + apart * found.shape[-1] / 1e-5)
    near("log-probabilities", found[both], exact[both], allowed * (1 + exact[both].abs()))


def same_draws(codes: Tensor, given: Arguments, rows: Any) -> None:
    """A code that the number, or one within rounding of it, draws."""
    settings = {name: value for name, value in given.items() if name != "uniform"}
    log_probs = ops.filter_logits(**settings, backend="reference").double()
    mass = torch.cat([torch.zeros_like(log_probs[..., :1]), log_probs.exp().cumsum(-1)], dim=-1)
    number, chosen = given["uniform"].detach().double()[..., None], codes[..., None]
    slack = 1e-5 if given.get("top_p", 1.0) == 1 else 1.0  # one code more or less moves all boundaries
    low, high = mass.gather(-1, chosen) - slack, mass.gather(-1, chosen + 1) + slack
    kept = log_probs.gather(-1, chosen) > (-math.inf if slack < 1 else -2 * math.inf)
    wrong = ~((low <= number) & (number <= high) & (kept | (slack == 1.0)))[..., 0]
    if bool(wrong[rows].any()):
        raise Finding(f"{int(wrong[rows].sum())} draws are not those of the numbers")


FLOW = ("noise", "codebook", "steps", "solver")


def same_codes(op: str, found: list[Tensor], exact: Tensor, given: Arguments, rows: Any) -> None:
    """The exact flow's code, or one that a slightly different noise leads to; the embeddings are theirs."""
    codes, embeddings = found
    if not torch.equal(embeddings, given["codebook"].detach()[codes]):
        raise Finding("embeddings are not those of the codes")
    top_p = given.get("top_p", 1.0)
    if op == "sample_codes":  # which codes are kept is decided in the precision of the logits
        filters = {name: value for name, value in given.items() if name not in FLOW}
        given = {name: value for name, value in given.items() if name in FLOW}
        given["log_probs"] = ops.filter_logits(**filters, backend="reference")
        exact = exactly("flow_sample", given)[0][0]
    probable = given["log_probs"].detach().gather(-1, codes[..., None])[..., 0] > -math.inf
    if not bool(probable[rows].all()) and top_p == 1:
        raise Finding("a code of no probability")
    if given.get("steps", 20) < 20 or top_p < 1:
        return  # far from the exact flow; or one code more or less
    apart = codes != exact
    for factor in (0.97, 0.99, 1.01, 1.03):
        for shift in (-0.02, 0.0, 0.02):
            if not bool(apart[rows].any()):
                return
            near_by = given | {"noise": given["noise"].detach().double() * factor + shift}
            apart = apart & (codes != exactly("flow_sample", near_by)[0][0])
    if bool(apart[rows].any()):
        raise Finding(f"{int(apart[rows].sum())} of {codes.numel()} codes are not those of the exact flow")


# -- changes -----------------------------------------------------------------------------------------------------------


def transposed(value: Tensor) -> Tensor:
    """The same numbers, with dimensions in another order in memory."""
    return value.transpose(0, -1).contiguous().transpose(0, -1) if value.dim() > 1 else value


def spread(value: Tensor) -> Tensor:
    """The same numbers, every other one of a memory that begins elsewhere."""
    if not value.dim():
        return value
    room = torch.full((*value.shape[:-1], 2 * value.shape[-1] + 3), 77, dtype=torch.float32).to(value.dtype)
    view = room[..., 3::2] if value.shape[-1] else room[..., :0]
    view.copy_(value)
    return view


def sliced(value: Tensor) -> Tensor:
    """The same numbers within rows that are longer."""
    if not value.dim():
        return value
    room = torch.full((*value.shape[:-1], value.shape[-1] + 3), 77, dtype=torch.float32).to(value.dtype)
    view = room[..., 1 : value.shape[-1] + 1]
    view.copy_(value)
    return view


def expanded(value: Tensor) -> Tensor:
    """The first of a dimension for all of it, with a stride of nothing."""
    return value[:1].expand(value.shape) if value.dim() and len(value) else value


def repeated(value: Tensor) -> Tensor:
    """The first of the last dimension for all of it, with a stride of nothing."""
    return value[..., :1].expand(value.shape) if value.dim() and value.shape[-1] else value


def negated(value: Tensor) -> Tensor:
    """The same numbers, of which the memory holds the negatives."""
    if value.dtype not in (torch.float32, torch.float64):
        return value
    return torch.complex(torch.zeros_like(value), -value).conj().imag


def misaligned(value: Tensor) -> Tensor:
    """The same numbers at an address that their size does not divide."""
    room = torch.zeros(value.numel() * value.element_size() + 1, dtype=torch.uint8).numpy()
    if not value.numel() or value.dtype not in (torch.float16, torch.float32, torch.float64):
        return value
    view = torch.from_numpy(room[1:].view(str(value.dtype).removeprefix("torch.")))
    return view.copy_(value.reshape(-1)).view(value.shape)


BEARABLE: dict[str, Callable[[Tensor], Any]] = {
    "transposed": transposed,
    "spread": spread,
    "sliced": sliced,
    "expanded": expanded,
    "repeated": repeated,
    "negated": negated,
    "misaligned": misaligned,
    "a parameter": lambda value: torch.nn.Parameter(value) if value.is_floating_point() else value,
    "with a gradient": lambda value: value.clone().requires_grad_() if value.is_floating_point() else value,
}
"""Changes of a tensor that leave it valid, though an op may refuse some (caches are contiguous, a teacher detached)."""

OTHER_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "unsqueezed": lambda value: value[None],
    "one dimension more": lambda value: value[..., None],
    "of its first": lambda value: value[0] if value.dim() and len(value) else value[None],
    "flat": lambda value: value.flatten(),
    "longer": lambda value: torch.cat([value, value[:1]]) if value.dim() else value.expand(2),
    "wider": lambda value: torch.cat([value, value[..., :1]], -1) if value.dim() else value.expand(3),
    "shorter": lambda value: value[:-1] if value.dim() else value,
    "narrower": lambda value: value[..., :-1] if value.dim() else value,
    "of nothing": lambda value: value[:0] if value.dim() else value[None][:0],
    "without a width": lambda value: value[..., :0] if value.dim() else value,
    "a scalar": lambda value: torch.tensor(0.5),
    "turned": lambda value: value.transpose(0, -1) if value.dim() else value,
    "int32": lambda value: value.nan_to_num(0).to(torch.int32),
    "int64": lambda value: value.nan_to_num(0).to(torch.int64),
    "bool": lambda value: value.to(torch.bool),
    "complex": lambda value: value.to(torch.complex64),
    "float8": lambda value: value.to(torch.float8_e4m3fn),
    "uint16": lambda value: value.nan_to_num(0).abs().to(torch.uint16),
    "quantised": lambda value: torch.quantize_per_tensor(value.detach().float(), 0.1, 0, torch.qint8),
    "sparse": lambda value: value.detach().to_sparse(),
    "compressed": lambda value: value.detach().to_sparse_csr() if value.dim() == 2 else value.detach().to_sparse(),
    "nested": lambda value: torch.nested.nested_tensor([value.detach(), value.detach()]),
    "jagged": lambda value: torch.nested.nested_tensor([value.detach()], layout=torch.jagged),
    "on no device": lambda value: value.to("meta"),
    "NumPy's": lambda value: value.detach().float().numpy(),
    "a list": lambda value: value.tolist(),
    "None": lambda value: None,
    "a string": lambda value: "0.5",
    "a number": lambda value: 0.5,
    "an object": lambda value: object(),
    "a class": lambda value: Tensor,
}
"""Changes of a tensor that an op may refuse, in one line."""

VALUES = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40, -0.0, 1e-30, 1e20)

ODD_NUMBERS: tuple[Any, ...] = (
    0, -0.0, -1, 1.5, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**63) - 1, 10**400, -(10**400),
    1e-320, 1e-45, 1e300, -1e300, math.nan, math.inf, -math.inf, True, False, None, "1", b"1", 1j, [], [1], {}, (),
    Fraction(1, 3), np.float32(0.5), np.float64(0.5), np.float16(0.5), np.int64(1), np.int32(2), np.uint64(2**64 - 1),
    np.bool_(True), np.array(0.5), np.array([0.5]), torch.tensor(0.5), torch.tensor(1), torch.tensor([1, 2]),
    torch.tensor(0.5, device="meta"), object(), int, "dpm3m", "gelu", "silu", "swiglu", "cpu", "none", "x\ny",
)  # fmt: skip
"""What is given in the place of numbers, names and switches."""


def tensor_names(a: Arguments) -> list[str]:
    return [name for name, value in a.items() if type(value) is Tensor and is_plain(value)]


def is_extreme(name: str, value: Any) -> bool:
    """Whether an op may take a number and have no finite result: scores overflow, or a variance of 0 stays 0."""
    if not isinstance(value, float):
        return False
    return (name == "scale" and abs(value) > 1e6) or (name == "eps" and value < 1e-30)


def change(case: Case, draw: Draw) -> None:
    """One change of a case."""
    a = case.arguments
    names, settings = tensor_names(a), TABLE[case.op].settings
    kind = draw.of(*["bearable"] * 4, "dtype", "other", "other", "value", "value", "setting", "setting", "alias")
    if kind != "setting" and not names:
        return
    name = draw.of(*names) if kind != "setting" else draw.of(*settings)
    if kind == "bearable":
        how = draw.of(*BEARABLE)
        with contextlib.suppress(NotImplementedError):  # what PyTorch does not make itself, of float8 for example
            a[name] = BEARABLE[how](a[name])
        # Caches must be contiguous, only x takes a gradient, and a repeated row may have nothing left.
        case.refusable |= name in TABLE[case.op].written or how in ("a parameter", "with a gradient", "repeated")
        if how == "expanded" and any(name == spoilt for spoilt, _ in case.spoilt):
            case.spoilt += [(name, row) for row in range(len(a[name]))]
        case.refusable |= how in ("expanded", "misaligned")  # a kernel takes no such address, a reference does
    elif kind == "dtype":
        dtype = draw.dtype()
        if a[name].is_floating_point():
            a[name] = a[name].to(dtype)
            how = str(dtype)
            case.refusable = True
        else:
            return
    elif kind == "other":
        how = draw.of(*OTHER_TENSORS)
        with contextlib.suppress(RuntimeError, NotImplementedError, TypeError):  # what PyTorch does not make itself
            a[name] = OTHER_TENSORS[how](a[name])
        case.refusable = True
    elif kind == "value":
        if not a[name].is_floating_point() or not a[name].numel() or not a[name].dim():
            return
        value = draw.of(*VALUES)
        how = f"with a {value}"
        a[name] = a[name].clone(memory_format=torch.contiguous_format)
        place = draw.random.randrange(a[name].numel())
        a[name].view(-1)[place] = value
        case.spoilt.append((name, place // max(1, a[name].numel() // len(a[name]))))
        case.refusable = True
    elif kind == "setting":
        value = draw.of(*ODD_NUMBERS)
        if name == "shape":
            if isinstance(value, (int, np.integer)) and 2**16 < value < 2**34:
                value = 2  # asked for, and given, as far as there is memory
            value = draw.of(value, (value,), (value, 0), [2, value], (2**20, 2**20), (2**63, 0), (2**40, 0), "ab")
        if name == "steps" and isinstance(value, (int, np.integer)) and 100 < value < MOST_STEPS:
            value = 100  # asked for, and given: it takes its time
        how, a[name] = f"{value!r}", value
        case.refusable = True
        if is_extreme(name, value):
            case.spoilt.append((name, 0))
    else:
        other = draw.of(*names)
        one, two = a[name], a[other]
        if name == other or one.shape != two.shape or one.dtype != two.dtype:
            return
        how, a[name] = f"the memory of {other}", two if draw.maybe(0.5) else two.view(two.shape)
        case.refusable = True
    case.changes.append(f"{name} {how}")


@dataclass(frozen=True)
class Entry:
    """What is known of an op: how valid arguments are made, and which are of what kind."""

    make: Callable[[Draw], Arguments]
    settings: tuple[str, ...]
    rows: tuple[str, ...]  # whose first dimension is that of the result
    written: tuple[str, ...] = ()


_FILTERS = ("temperature", "top_k", "top_p", "cfg_scale", "uncond", "backend")
_FLOW = ("steps", "solver", "backend")
TABLE = {
    "nearest_code": Entry(nearest_code, ("cosine", "backend"), ("x",)),
    "filter_logits": Entry(filter_logits, _FILTERS, ("logits", "uncond")),
    "draw_codes": Entry(draw_codes, _FILTERS, ("logits", "uncond", "uniform")),
    "codebook_posterior": Entry(codebook_posterior, ("t", "backend"), ("x",)),
    "velocity": Entry(codebook_posterior, ("t", "backend"), ("x",)),
    "score": Entry(codebook_posterior, ("t", "backend"), ("x",)),
    "flow_sample": Entry(flow_sample, _FLOW, ("log_probs", "noise")),
    "sample_codes": Entry(sample_codes, (*_FILTERS, *_FLOW), ("logits", "uncond", "noise")),
    "decode_attention": Entry(
        decode_attention, ("scale", "rope", "first", "backend"), ("qkv", "keys", "values"), ("keys", "values")
    ),
    "add_norm": Entry(add_norm, ("eps", "rms", "branch", "gate", "weight", "bias", "backend"), ("x", "branch")),
    "norm_linear": Entry(
        norm_linear, ("eps", "rms", "activation", "linear_bias", "branch", "backend"), ("x", "branch")
    ),
    "append_normed": Entry(append_normed, ("start", "scale", "backend"), ("qkv", "keys", "values"), ("keys", "values")),
    "activate": Entry(activate, ("kind", "times", "backend"), ("x", "times")),
    "noise": Entry(noise, ("seed", "index", "shape", "device", "backend"), ()),
}


def make(op: str, number: int) -> tuple[Case, Draw]:
    draw = Draw(f"{op} {number}")
    case = Case(op, TABLE[op].make(draw))
    backends = [name for name in dispatch.KERNELS.get(op, ("cpu",)) if name == "cpu" and name in dispatch.available()]
    case.arguments["backend"] = draw.of("auto", "auto", "reference", *backends)
    if draw.maybe(0.25):  # all of one dtype
        dtype = draw.dtype()
        for name in tensor_names(case.arguments):
            value = case.arguments[name]
            if value.is_floating_point() and name != "rope":
                case.arguments[name] = value.to(dtype)
        case.changes.append(f"all {dtype}")
        # A kernel that was asked for has none for float64; numbers just below 1, or just above 0, are rounded to them.
        case.refusable = dtype == torch.float64 or any(name in case.arguments for name in ("uniform", "t"))
    for _ in range(draw.of(0, 1, 1, 1, 2, 3)):
        change(case, draw)
    return case, draw


def is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not (value.is_nested or value.is_quantized) and value.layout == torch.strided \
        and value.is_cpu  # fmt: skip


def memory_of(value: Tensor) -> Tensor:
    """All bytes of a tensor's storage, copied."""
    return torch.tensor([], dtype=torch.uint8).set_(value.detach().untyped_storage()).clone()


@contextlib.contextmanager
def mode(name: str) -> Iterator[None]:
    with {"grad": torch.enable_grad, "no grad": torch.no_grad, "inference": torch.inference_mode}[name]():
        yield


def run(op: str, number: int) -> str:
    """What the case of a number came to, as `judge` says."""
    case, draw = make(op, number)
    return judge(case, draw.of("grad", "no grad", "inference"))


def judge(case: Case, how: str = "grad") -> str:
    """What a case came to, in a mode of autograd: "refused" or "right".

    Raises:
        Finding: neither.
    """
    op, a = case.op, case.arguments
    plain = {name: value for name, value in a.items() if is_plain(value)}
    written = {value.untyped_storage().data_ptr() for name, value in plain.items() if name in TABLE[op].written}
    before = {name: memory_of(value) for name, value in plain.items()
              if value.untyped_storage().data_ptr() not in written}  # fmt: skip
    given = {name: value.detach().clone() if is_plain(value) else value for name, value in a.items()}
    try:
        with warnings.catch_warnings(), mode(how):
            warnings.simplefilter("ignore")
            found = tensors_of(getattr(ops, op)(**a))
    except REFUSALS as error:
        said = str(error)
        if not case.refusable:
            raise Finding(f"refused: {said} -- {case}") from error
        if "\n" in said or not re.match(r"[a-z_]+: ", said):
            raise Finding(f"refused in other words: {type(error).__name__}: {said!r} -- {case}") from error
        return "refused"
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {str(error)[:200]!r} -- {case}") from error
    try:
        for name, memory in before.items():
            if not torch.equal(memory_of(a[name]), memory):
                raise Finding(f"{name} was written to")
        expected, first = outputs_of(op, given), next(iter(given))
        for part, (result, (shape, dtype)) in enumerate(zip(found, expected, strict=True)):
            if tuple(result.shape) != tuple(shape) or (result.dtype != dtype and not mixed(op, given)):
                raise Finding(f"result {part} is {result.dtype} {list(result.shape)}, not {dtype} {list(shape)}")
        if any(isinstance(value, Tensor) and value.is_meta for value in (*found, given.get(first))):
            if not all(result.is_meta for result in found):
                raise Finding("a result of no device's tensors that is on one")
            return "right"
        given.pop("backend", None)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            compare(case, found, given)
    except Finding as finding:
        raise Finding(f"{finding} -- {how}, {case}") from None
    except Exception as error:
        raise Finding(f"no comparison: {type(error).__name__}: {str(error)[:200]!r} -- {case}") from error
    return "right"


def resident() -> float:
    """Megabytes that the process holds; 0 where that is not to be had."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * mmap.PAGESIZE / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, help="of every op")
    parser.add_argument("--seed", type=int, default=0, help="the first case's number")
    parser.add_argument("--op", choices=sorted(TABLE), action="append")
    parser.add_argument("--findings", type=int, default=5, help="of an op, after which the next one is taken")
    parser.add_argument(
        "--growth", type=float, default=30.0, help="megabytes that a process may grow by in half of them"
    )
    options = parser.parse_args()
    failed = 0
    for op in options.op or sorted(TABLE):
        start, outcomes, held = time.monotonic(), Counter[str](), 0.0
        for number in range(options.seed, options.seed + options.cases):
            if number == options.seed + options.cases // 2:  # buffers have grown to the largest shape by now
                held = resident()
            try:
                outcomes[run(op, number)] += 1
            except Finding as finding:
                outcomes["findings"] += 1
                print(f"{op} {number}: {finding}", flush=True)
                if outcomes["findings"] >= options.findings:
                    break
        failed += outcomes["findings"]
        grown = resident() - held
        print(
            f"{op}: {dict(outcomes)}, {time.monotonic() - start:.1f} s, {grown:+.1f} MB in the second half", flush=True
        )
        if grown > options.growth:
            print(f"{op}: the process has grown by more than {options.growth} MB")
            failed += 1
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

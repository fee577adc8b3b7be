"""What the ops share: the torch.library namespace, argument checks and the view of leading dimensions as rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddfast import env, private_api
from ddfast.errors import shown
from ddfast.ops import dispatch, native

library = torch.library.Library("ddfast", "DEF")


def define(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Register one op and return what calls it; `Library.define` and `impl` cost less than `custom_op`.

    The dispatcher takes 5 us a call, on a CPU as long as a small kernel. In inference mode, with nothing there that
    would want to see the op (a compiler, a profiler, a mode, a subclass of Tensor, a tensor without memory), the
    implementation is called as it is.

    Under torch.compile the op's floats go in as tensors, by an overload of its own: as numbers they would become part
    of the graph, and every other value would compile anew.
    """
    name, parameters = schema.split("(", 1)
    floats = [number for number, parameter in enumerate(parameters.split(",")) if parameter.lstrip()[:6] == "float "]

    def with_numbers(*arguments: Any) -> Any:
        given = list(arguments)
        for number in floats:
            given[number] = float(given[number])
        return implementation(*given)

    _register(schema, implementation, fake)
    if floats:
        _register(f"{name}.compiled({parameters.replace('float ', 'Tensor ')}", with_numbers, fake)
    op = getattr(torch.ops.ddfast, name)

    def call(first: Tensor, *rest: Any) -> Any:
        if not isinstance(rest[-1], str):  # which a schema refuses in a page of its own words
            raise TypeError(f"backend: got {typed(rest[-1])}, expected a name")
        if torch.compiler.is_compiling():
            given = [first, *rest]
            for number in floats:
                given[number] = scalar(given[number], torch.float64)
            return op.compiled(*given) if floats else op(*given)
        if not torch.is_inference_mode_enabled():
            return op(first, *rest)
        if private_api.is_watched() or type(first) is not Tensor or first.is_meta:
            return op(first, *rest)
        return implementation(first, *rest)

    return call


def _register(schema: str, implementation: Callable, fake: Callable) -> None:
    name = schema[: schema.index("(")]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ddfast::{name}", fake, lib=library)


def scalar(value: float, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A number as a tensor [], filled where it is: a copy from the host would wait, and no graph could capture it.

    Under torch.compile it is a product, the one form in which the number does not become part of the graph.
    """
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=dtype, device=device) * value
    return torch.full((), value, dtype=dtype, device=device)


def rows_are_checked(backend: str, tensor: Tensor) -> bool:
    """Whether bad values raise: a kernel on a GPU marks them in its result, since looking would wait for the device."""
    return backend not in ("triton", "cuda") or tensor.device.type == "cpu"


def launch_place(tensor: Tensor) -> tuple[int, int]:
    """Device number and current stream's address, the CUDA module's trailing arguments."""
    if tensor.device.type != "cuda":
        return 0, 0
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream


def backend_of(op: str, backend: str, *tensors: Tensor | None, dim: int = 0, size: int = 0) -> str:
    """Dispatch on the first tensor's device, rows and dtype, or that of one of them that no kernel reads.

    `dim` and `size` as in `dispatch.choose`.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    first, dtype = present[0], kernel_dtype(*present)
    # What `choose` finds for most calls on a CPU, in a third of its time: they may be as short as 20 us.
    runs = first.is_cpu and native.cpu is not None and dtype in native.DTYPE_CODES and "cpu" in dispatch.KERNELS[op]
    if runs and backend == "auto" and not env.backend_setting():
        return "cpu"
    rows = first.numel() // max(first.shape[-1], 1) if first.dim() else 1
    return dispatch.choose(op, first.device, dtype, backend, rows, dim=dim, size=size).backend


def sizes_of(codebook: Tensor) -> dict[str, Any]:
    """What decides between kernels, of a codebook [V, d]: `dim` and `size` of `dispatch.choose`."""
    return {"dim": codebook.shape[1], "size": codebook.shape[0]}


def kernel_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What a kernel is chosen by: the first tensor's dtype, or that of one which no kernel reads, such as float64."""
    present = [tensor.dtype for tensor in tensors if tensor is not None]
    return next((dtype for dtype in present if dtype not in native.DTYPE_CODES), present[0])


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is; otherwise float32, in which every reduced-precision input is accumulated."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in native.DTYPE_CODES:
            return torch.float64
    return torch.float32


def threads() -> int:
    """Threads a CPU kernel may use: PyTorch's own setting."""
    return torch.get_num_threads()


def rows_of(tensor: Tensor) -> Tensor:
    """[..., K] as [rows, K] with unit stride along K; a copy only where the strides allow no such view."""
    flat = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    if flat.is_neg():  # of numbers whose negatives lie in memory, as those of conj().imag
        flat = flat.resolve_neg()
    return flat if flat.stride(-1) == 1 or flat.shape[-1] <= 1 else flat.contiguous()


def float_rows(tensor: Tensor) -> Tensor:
    """[..., K] as contiguous float32 [rows, K]."""
    return rows_of(tensor).to(torch.float32).contiguous()


def float_vector(tensor: Tensor) -> Tensor:
    """[...] as contiguous float32 [rows]."""
    return tensor.reshape(-1).float().contiguous().resolve_neg()


_FLOATS = frozenset({torch.float64, *native.DTYPE_CODES})
"""Of the shorter ones PyTorch has few functions, which the references need."""

_NUMBERS = (float, Integral, np.floating)
"""Not every Real: a schema takes no fraction."""


_LARGEST = torch.finfo(torch.float32).max


def check_tensor(name: str, tensor: object) -> None:
    """`tensor` is one, whose numbers lie in memory as its strides say."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name}: got {kind}, expected a dense tensor")


def check_written(written: Mapping[str, Tensor], read: Tensor) -> None:
    """Tensors may be written to where they are, and share memory neither with each other nor with one that is read.

    What traces or transforms a call has tensors without memory, of which there is nothing to ask.
    """
    if torch.compiler.is_compiling() or private_api.is_watched() or private_api.is_fake(read):
        return
    for name, tensor in written.items():
        if tensor.requires_grad and private_api.base(tensor).is_leaf and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires a gradient, expected a detached tensor, which can be written to")
        if tensor.is_neg():
            raise ValueError(f"{name}: got a view of negatives, as of conj().imag, expected numbers of its own")
    everything = (*written.values(), read)
    if len({tensor.untyped_storage().data_ptr() for tensor in everything}) == len(everything):
        return  # the usual, in a microsecond
    for place, name in enumerate(written):
        begin, end = _span(everything[place])
        for first, last in map(_span, everything[place + 1 :]):
            if begin < last and first < end:
                raise ValueError(
                    f"{name}: got memory that another argument lies in, expected its own: it is written to"
                )


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses between which a tensor's numbers lie; nothing without memory."""
    if tensor.numel() == 0 or tensor.is_meta:
        return 0, 0
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + length * tensor.element_size()


def moved(name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of few numbers as the computation has it, and where."""
    if tensor.is_meta and device.type != "meta":
        raise ValueError(f"{name}: got device meta, expected a tensor that has values")
    return tensor.to(device, dtype)


def check_float(name: str, tensor: object, like: Tensor | None = None) -> None:
    """`tensor` is a floating-point tensor, on the device of `like`."""
    check_tensor(name, tensor)
    assert isinstance(tensor, Tensor)
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected a floating-point tensor of 16, 32 or 64 bits")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: got device {tensor.device}, expected {like.device} as the first argument")


def check_number(name: str, value: object, kind: type = Real, *, below: int = 2**63) -> None:
    """`value` is a number that an op's schema can hold, or with `kind` Integral a whole one; True and False are none.

    Args:
        below: what whole numbers must not reach; they start at -2^63.
    """
    if isinstance(value, bool) or not isinstance(value, kind) or not isinstance(value, _NUMBERS):
        expected = "an integer" if kind is Integral else "a number"
        raise TypeError(f"{name}: got {typed(value)}, expected {expected}")
    if isinstance(value, Integral) and not -(2**63) <= value < below:  # type: ignore[operator]
        raise ValueError(f"{name}: got {typed(value)}, expected from -2^63 to {below - 1}")


def check_factor(name: str, value: object) -> None:
    """`value` is a finite number of float32, in which kernels multiply by it."""
    check_number(name, value)
    if not -_LARGEST <= value <= _LARGEST:  # type: ignore[operator]
        raise ValueError(f"{name}: got {value}, expected a finite number of float32")


def typed(value: object) -> str:
    """Type and value in one line."""
    return f"{type(value).__name__} {shown(value)}"


def check_switch(name: str, value: object) -> None:
    """`value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {typed(value)}, expected True or False")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise unless all values are finite: their sum says so in one pass, unless it overflows."""
    total = float(tensor.detach().sum(dtype=compute_dtype(tensor)))
    if not math.isfinite(total) and not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: got NaN or infinite values, expected finite ones")


def check_codebook(codebook: object, dim: int, like: Tensor) -> None:
    """`codebook` is [V, dim] with at least one code."""
    check_float("codebook", codebook, like)
    assert isinstance(codebook, Tensor)
    if codebook.dim() != 2 or codebook.shape[0] < 1 or codebook.shape[1] != dim or dim < 1:
        raise ValueError(f"codebook: got shape {tuple(codebook.shape)}, expected [V >= 1, {dim}]")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """`tensor` has exactly the shape `expected`."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {list(expected)}")


def check_rows(name: str, status: int) -> None:
    """Turn a kernel's status (the first row it could not use, or -1) into the user's error."""
    if status >= 0:
        raise ValueError(
            f"{name}: row {status} has NaN, +inf or no finite entry; expected at least one finite value per row"
        )


def marked_row(codes: Tensor) -> int:
    """The first row that a GPU's kernel marked with -1, or -1: there are none, or looking would wait for the device."""
    if codes.device.type != "cpu" or not bool((codes < 0).any()):
        return -1
    return int((codes.flatten() < 0).nonzero()[0, 0])


def bad_row(log_probs: Tensor) -> int:
    """The status a kernel would return: the first row with NaN, +inf or nothing finite, or -1."""
    bad = log_probs.isnan().any(-1) | (log_probs == math.inf).any(-1) | (log_probs == -math.inf).all(-1)
    return int(bad.nonzero()[0, 0]) if bool(bad.any()) else -1

"""Checkpoint files: ours are safetensors with the configuration in the header; PyTorch's are read, never run."""

from __future__ import annotations

import argparse
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ddfast.errors import DDFastError
from ddfast.files import write_atomically

PYTORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")

Model = TypeVar("Model", bound=nn.Module)


def save_tensors(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write tensors and their configuration to `path`, which is either the old file or the whole new one, always."""
    write_atomically(Path(path), save(storable(tensors), _header(config)))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (mapped from the file, not copied) and configuration of a safetensors file (none: an empty dict).

    Raises:
        DDFastError: the file is missing, damaged, or not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise DDFastError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
            return tensors, json.loads((file.metadata() or {}).get("config", "{}"))
    except (SafetensorError, ValueError) as error:
        raise DDFastError(f"{path} is not a readable safetensors file: {error}") from error


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Content of a checkpoint of either kind, mapped from the file, and its configuration (PyTorch's: empty).

    PyTorch files are read by `torch.load(weights_only=True)`: tensors and plain containers, and `argparse.Namespace`
    (training scripts store their options), nothing else; no code of the file runs.

    Raises:
        DDFastError: the file is missing, damaged, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if path.suffix not in PYTORCH_SUFFIXES:
        return load_tensors(path)
    if not path.is_file():
        raise DDFastError(f"no checkpoint at {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                content = torch.load(path, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):  # bytes that are no pickle of PyTorch at all
            raise DDFastError(f"{path} is damaged or no PyTorch checkpoint") from error
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), "")
        found = f" ({reason.strip()[:160]})" if reason else ""
        raise DDFastError(
            f"{path} holds something else than tensors{found}: refused, nothing of it was run; "
            "save its state_dict alone"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError, OSError) as error:
        raise DDFastError(f"{path} is damaged or no PyTorch checkpoint: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise DDFastError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    return content, {}


def only_tensors(content: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among a dict's values, without the prefix that wrappers such as DistributedDataParallel add."""
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file takes them: on the CPU, contiguous, none inside another's memory."""
    return unshared({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def cast_floats(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors with the floating-point ones in `dtype`; None: as they are."""
    if dtype is None:
        return tensors
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, copied where two of them share memory: editing one must not change another."""
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel())
    shared = {pointer for pointer, count in owners.items() if count > 1}
    if not shared:
        return tensors
    # Tensors of a mapped file share one storage without overlapping; a copy is only needed where ranges meet.
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), name)
        for name, tensor in tensors.items()
        if tensor.numel() and tensor.untyped_storage().data_ptr() in shared
    )
    result, end = dict(tensors), 0
    for start, stop, name in spans:
        if start < end:
            result[name] = tensors[name].clone()
        else:
            end = stop
    return result


def state_problems(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """What keeps `tensors` from being a state with the names and shapes of `expected`, an entry per tensor."""
    problems = [f"missing {name} {list(expected[name].shape)}" for name in expected if name not in tensors]
    problems += [f"unexpected {name} {list(tensors[name].shape)}" for name in tensors if name not in expected]
    return problems + [
        f"{name} is {list(tensors[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]


def load_state(module: nn.Module, tensors: dict[str, Tensor], source: object, *, assign: bool = False) -> None:
    """`module.load_state_dict`, strict, with one error that names every tensor that does not fit."""
    problems = state_problems(module.state_dict(), tensors)
    if problems:
        raise DDFastError(f"{source} does not fit {type(module).__name__}: " + "; ".join(problems))
    module.load_state_dict(tensors, assign=assign)


def build_around(
    make: Callable[[], Model],
    tensors: dict[str, Tensor],
    source: object,
    *,
    derived: Iterable[str] = (),
) -> Model:
    """A module whose parameters *are* the given tensors: nothing is drawn, allocated or copied first.

    The module is made on the meta device and the tensors are assigned, so a checkpoint that was mapped from a file is
    paged in as it is used. A module's `derive_buffers()` then fills what is in no file.

    Args:
        make: builds the module.
        tensors: its state; every name and shape must fit.
        source: where they come from, for the error.
        derived: names (or ends of names, from the last dot on) of buffers in official files that the module computes.

    Raises:
        DDFastError: tensors are missing, unexpected or of another shape; each is listed.
    """
    endings = tuple(derived)
    kept = {n: value for n, value in tensors.items() if not n.endswith(endings)} if endings else tensors
    with torch.device("meta"):
        module = make()
    load_state(module, unshared(kept), source, assign=True)
    for child in module.modules():
        derive = getattr(child, "derive_buffers", None)
        if derive is not None:
            derive()
    return module.eval().requires_grad_(False)


def _header(config: dict[str, Any]) -> dict[str, str]:
    return {"config": json.dumps(config, sort_keys=True)}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

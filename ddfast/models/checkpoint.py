"""Checkpoint files: one safetensors file whose header carries the configuration as JSON; written atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ddfast.errors import DDFastError
from ddfast.files import write_atomically


def save_tensors(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write tensors and their configuration to `path`, which is either the old file or the whole new one, always."""
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, _header(config))
    write_atomically(Path(path), data)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of a file that `save_tensors` wrote (no configuration: an empty dict).

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


def load_state(module: nn.Module, tensors: dict[str, Tensor], source: object) -> None:
    """`module.load_state_dict`, strict, with one error that names every tensor that does not fit."""
    expected = module.state_dict()
    problems = [f"missing {name} {list(expected[name].shape)}" for name in expected if name not in tensors]
    problems += [f"unexpected {name} {list(tensors[name].shape)}" for name in tensors if name not in expected]
    problems += [
        f"{name} is {list(tensors[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if problems:
        raise DDFastError(f"{source} does not fit {type(module).__name__}: " + "; ".join(problems))
    module.load_state_dict(tensors)


def _header(config: dict[str, Any]) -> dict[str, str]:
    return {"config": json.dumps(config, sort_keys=True)}

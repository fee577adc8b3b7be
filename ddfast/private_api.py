"""PyTorch's private names that ddfast uses, each looked up once; where one is missing, the slow public way is taken."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _find(path: str) -> Any:
    """The object at a dotted path below `torch`, None where there is none."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


_MODES = _find("_C._len_torch_dispatch_stack")
_TRANSFORM = _find("_C._functorch.peek_interpreter_stack")
_PROFILED = _find("autograd._profiler_enabled")
_CLEAR_WORKSPACES = _find("_C._cuda_clearCublasWorkspaces")
_GLOBAL_HOOKS = _find("nn.modules.module._has_any_global_hook")
_LERP = _find("_foreach_lerp_")
ITEM = _find("ops.aten._local_scalar_dense.default")
"""The op by which a tensor's value is asked for."""
ATTENTION = _find("ops.aten._scaled_dot_product_flash_attention_for_cpu")
ATTENTION_BACKWARD = _find("ops.aten._scaled_dot_product_flash_attention_for_cpu_backward")
"""What `scaled_dot_product_attention` becomes on a CPU; None where this PyTorch has other names."""
_SET_TIMEOUT = _find("distributed.set_timeout") or _find("distributed.distributed_c10d._set_pg_timeout")
"""Public from 2.15 on."""
_ABORT = _find("distributed.distributed_c10d._abort_process_group")


def set_timeout(group: Any, limit: datetime.timedelta) -> None:
    """How long processes of a group wait for each other; without the name, as long as PyTorch lets them."""
    if _SET_TIMEOUT is not None:
        _SET_TIMEOUT(limit, group)


def abort_groups() -> None:
    """End the talk with other processes without waiting for them; without the name, in the way that may wait."""
    (_ABORT or torch.distributed.destroy_process_group)()


def is_watched() -> bool:
    """Whether a mode, a functorch transform or a profiler may want to see an op; where nothing tells, it is assumed."""
    if _MODES is None or _TRANSFORM is None or _PROFILED is None:
        return True
    return bool(_MODES()) or _TRANSFORM() is not None or _PROFILED()


def is_profiled() -> bool:
    """Whether PyTorch's profiler records; where nothing tells, it is assumed."""
    return _PROFILED is None or _PROFILED()


def is_hooked(module: torch.nn.Module) -> bool:
    """Whether a call of a module is more than its `forward`, or another `forward` than its class has."""
    if _GLOBAL_HOOKS is None or "forward" in vars(module):
        return True
    own = (getattr(module, name, True) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"))
    return any(own) or bool(_GLOBAL_HOOKS())


def is_persistent(module: torch.nn.Module, buffer: str) -> bool:
    """Whether a module's state has a buffer of its own; without the name, all are taken to be in it."""
    return buffer not in getattr(module, "_non_persistent_buffers_set", ())


def writes(tensor: Tensor) -> int:
    """How often a tensor was written to, as PyTorch counts it; -1 where it does not count."""
    return -1 if tensor.is_inference() else getattr(tensor, "_version", -1)


def base(tensor: Tensor) -> Tensor:
    """What a tensor is a view of, or itself; itself too where nothing tells."""
    whole = getattr(tensor, "_base", None)
    return tensor if whole is None else whole


def storage_key(tensor: Tensor) -> int:
    """What identifies a tensor's memory as long as that lives."""
    storage = tensor.untyped_storage()
    key = getattr(storage, "_cdata", None)
    return storage.data_ptr() if key is None else key


def clear_cublas_workspaces() -> None:
    """Let cuBLAS ask for its workspaces anew; without the name, a graph uses those that are there."""
    if _CLEAR_WORKSPACES is not None:
        _CLEAR_WORKSPACES()


def foreach_lerp_(targets: Sequence[Tensor], towards: Sequence[Tensor], rate: float) -> None:
    """`lerp_` of many tensors, in few launches where that can be had."""
    if _LERP is not None:
        _LERP(targets, towards, rate)
        return
    for target, other in zip(targets, towards, strict=True):
        target.lerp_(other, rate)


@functools.lru_cache
def _late(module: str, name: str) -> Any:
    """A name of a module whose import takes seconds, looked up when it is first needed."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def fake_tensors(**settings: Any) -> contextlib.AbstractContextManager[object] | None:
    """A mode in which tensors have no memory; None where there is none."""
    mode = _late("torch._subclasses.fake_tensor", "FakeTensorMode")
    return None if mode is None else mode(**settings)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no memory and so no values."""
    module = sys.modules.get("torch._subclasses.fake_tensor")  # not imported: there are none yet
    return module is not None and isinstance(tensor, getattr(module, "FakeTensor", ()))


def recompilations(limit: int) -> contextlib.AbstractContextManager[object]:
    """Within, torch.compile makes up to so many variants of a function before it falls back to eager mode."""
    config = _late("torch._dynamo", "config")
    return contextlib.nullcontext() if config is None else config.patch(recompile_limit=limit)


def mark_static_address(tensor: Tensor) -> None:
    """Promise that a tensor stays where it is: a CUDA graph then reads it there; without the name, it is copied."""
    mark = _late("torch._dynamo", "mark_static_address")
    if mark is not None:
        mark(tensor)


def every_call(handler: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> contextlib.AbstractContextManager:
    """Within, `handler(op, arguments, settings)` is called in the place of every op, below autograd.

    Raises:
        RuntimeError: this PyTorch has no such mode.
    """
    mode = _late("torch.utils._python_dispatch", "TorchDispatchMode")
    if mode is None:
        raise RuntimeError("this version of PyTorch has no mode in which ops can be watched")

    class Watching(mode):  # type: ignore[misc, valid-type]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return handler(func, args, kwargs or {})

    return Watching()

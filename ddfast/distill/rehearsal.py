"""Training steps rehearsed: the method's own code on tensors that have shapes and no memory, so on any machine.

What the steps would hold and compute is counted op by op: PyTorch's FakeTensorMode gives every op's results their sizes,
its FlopCounterMode counts the products, and a storage counts from the op that makes it until nothing refers to it.
Kernels of ddfast are ops too: of them counts what they return and keep for their backward pass, as on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ddfast import private_api, seeds
from ddfast.config import TrainConfig
from ddfast.distill.batch import Part
from ddfast.distill.method import Method
from ddfast.distill.trainer import from_noise
from ddfast.errors import DDFastError
from ddfast.models import families
from ddfast.models.blocks import blocks_of, recomputing
from ddfast.models.loading import untrained_teacher
from ddfast.models.protocol import Teacher

@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Of forward and backward of one micro-batch.

    Attributes:
        samples: in it.
        activations: bytes that the forward pass leaves for the backward pass.
        peak: bytes that live at a time, at most, beside parameters, buffers and gradients that were there before.
        flops: of products: matrices, attention, convolutions, and the flow over the codebook.
    """

    samples: int
    activations: int
    peak: int
    flops: int


class Rehearsal:
    """A configuration's teacher and the networks that learn from it, without memory, and their steps.

    Args:
        config: of the run; weights that it names are not read.
        make: the networks that are trained, by name, of the teacher; on the device "meta".
        device_type: whose steps they are: on cuda autocast keeps more ops in float32 than on cpu.

    Attributes:
        teacher, networks: to make methods of, within `pretending`.

    Raises:
        DDFastError: this PyTorch has no tensors without memory.
    """

    def __init__(
        self, config: TrainConfig, make: Callable[[Teacher], dict[str, nn.Module]], device_type: str = "cuda"
    ) -> None:
        fake = private_api.fake_tensors(allow_non_fake_inputs=True)
        if fake is None:
            raise DDFastError("this version of PyTorch has no FakeTensorMode, which a plan is made with")
        self.fake, self.device_type = fake, device_type
        with torch.device("meta"), private_api.every_call(_answered):
            self.teacher = untrained_teacher(config)
            self.networks = make(self.teacher)
        with self.pretending():
            for network in (self.teacher, *self.networks.values()):
                network.to_empty(device="cpu")
            families.of_teacher(self.teacher).conditioned(self.teacher, config.teacher)  # captions are no buffers
        for network in self.networks.values():
            network.train().requires_grad_(True)

    @contextlib.contextmanager
    def pretending(self) -> Iterator[None]:
        """Within, tensors have no memory, and a value that is asked for is 0."""
        with self.fake, private_api.every_call(_answered):
            yield

    def step(
        self,
        method: Method,
        phase: str,
        samples: int,
        *,
        precision: str = "float32",
        recompute: bool = False,
        accumulates: bool = False,
    ) -> StepCost:
        """What forward and backward of one micro-batch take.

        Args:
            method: made of this rehearsal's networks, within `pretending`.
            phase: of the method.
            samples: in the micro-batch.
            precision: as in `OptimisationConfig`.
            recompute: as `--parallel.recompute blocks`.
            accumulates: gradients of a micro-batch before are there.
        """
        networks = {id(network): network for network in method.networks.values()}.values()
        updated = method.networks[phase]
        held = [self.teacher, *networks]
        with self.fake:
            for network in networks:
                for parameter in network.parameters():
                    parameter.grad = torch.empty_like(parameter) if accumulates or network is not updated else None
        known = [tensor for network in held for tensor in (*network.parameters(), *network.buffers())]
        known += [parameter.grad for parameter in updated.parameters() if parameter.grad is not None]
        live = _Live(known)
        flops = FlopCounterMode(display=False, custom_mapping=_FLOPS)
        as_there = _cuda_autocast(updated) if self.device_type == "cuda" else contextlib.nullcontext()
        with self.fake, private_api.every_call(live.call), flops, as_there, recomputing(updated, recompute):
            part = Part.whole(samples, seeds.generator(0))
            batch = from_noise(self.teacher)(part, False)
            batch.codes = torch.zeros(samples, self.teacher.num_tokens, dtype=torch.int64)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                loss, logged = method.step(phase, batch, part)
            activations = live.now
            loss.backward()
            del loss, logged, batch
        for network in networks:
            network.zero_grad(set_to_none=True)
        return StepCost(samples=samples, activations=activations, peak=live.peak, flops=flops.get_total_flops())

    def sequence_flops(self) -> int:
        """Of one sequence that the teacher decodes, guidance included: those of a pass that is given all of its tokens.

        A cache computes every token once, as such a pass does; the flow's own work is small beside it.
        """
        flops = FlopCounterMode(display=False, custom_mapping=_FLOPS)
        with self.pretending(), flops, torch.no_grad():
            codes = torch.zeros(1, self.teacher.num_tokens, dtype=torch.int64)
            self.teacher.log_probs(self.teacher.condition_of(torch.zeros(1, dtype=torch.int64)), codes)
        return flops.get_total_flops()


_ITEM = torch.ops.aten._local_scalar_dense.default
_INDEX = torch.ops.aten.index.Tensor
_BINCOUNT = torch.ops.aten.bincount.default


def _answered(op: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    """An op on tensors without values: a value is 0, a mask chooses everything, no bin has more."""
    if op is _ITEM:
        return 0.0 if arguments[0].dtype.is_floating_point else 0
    if op is _INDEX and any(index is not None and index.dtype == torch.bool for index in arguments[1]):
        given, (mask,) = arguments
        rows = torch.arange(mask.numel(), dtype=torch.int64, device=given.device)
        return op(given.flatten(0, mask.dim() - 1), [rows])
    if op is _BINCOUNT:
        return torch.zeros(arguments[2], dtype=torch.int64, device=arguments[0].device)
    return op(*arguments, **settings)


class _Live:
    """Bytes of the storages that ops make, as long as they live.

    Args:
        known: tensors that are there before and do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.now = self.peak = 0
        self.seen: dict[int, Any] = {private_api.storage_key(tensor): None for tensor in known}

    def call(self, op: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        """The op's results, counted."""
        made = _answered(op, arguments, settings)
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return made

    def _see(self, tensor: Tensor) -> None:
        key = private_api.storage_key(tensor)
        if key in self.seen:
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self.seen[key] = weakref.ref(storage, functools.partial(self._gone, key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int, _: object) -> None:
        del self.seen[key]
        self.now -= size


@contextlib.contextmanager
def _cuda_autocast(network: nn.Module) -> Iterator[None]:
    """Within, autocast does as on a GPU, also in blocks that a backward pass computes again: no mode reaches there."""
    blocks = blocks_of(network)

    def forward(own: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        with _CudaAutocast():
            return own(*inputs, **options)

    for block in blocks:
        block.forward = functools.partial(forward, block.forward)  # type: ignore[method-assign]
    try:
        with _CudaAutocast():
            yield
    finally:
        for block in blocks:
            del block.forward


class _CudaAutocast(TorchFunctionMode):
    """The functions that autocast computes in float32 on a GPU and in bfloat16 on a CPU, of those that networks call.

    Source: PyTorch's page on automatic mixed precision, "CUDA Ops that can autocast to float32".
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cpu"):
            if name == "normalize":  # its norm is float32, and so the quotient
                x, dim = args[0], kwargs.get("dim", 1)
                return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
            if name in ("layer_norm", "group_norm", "cross_entropy", "l1_loss", "log1p", "exp", "log", "pow"):
                args = tuple(_float32(argument) for argument in args)
        return func(*args, **kwargs)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two products of [B, H, S, K]."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Five products, of which one repeats a forward one."""
    return _attention(query, key, value) * 5 // 2


def _flow(products: int) -> Callable[..., int]:
    """Products of points [..., D] with a codebook [V, D], the last argument of two dimensions."""

    def count(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
        x, codebook = shapes[0], next(shape for shape in reversed(shapes) if isinstance(shape, torch.Size) and len(shape) == 2)
        return 2 * products * math.prod(x[:-1]) * math.prod(codebook)

    return count


_ATEN, _OWN = torch.ops.aten, torch.ops.ddfast
_FLOPS: dict[Any, Callable[..., int]] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _OWN.codebook_posterior: _flow(2),
    _OWN.codebook_posterior_backward: _flow(3),
    _OWN.nearest_code: _flow(1),
}
"""Of what FlopCounterMode does not know."""

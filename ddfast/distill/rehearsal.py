"""Training steps rehearsed: the method's own code on tensors that have shapes and no memory, so on any machine.

What the steps would hold and compute is counted op by op: PyTorch's FakeTensorMode gives every op's results their
sizes, its flop_counter the work of products, and a storage counts from the op that makes it until nothing refers to it.
Kernels of ddfast are ops too: of them counts what they return and keep for their backward pass, as on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from ddfast import private_api, seeds
from ddfast.config import TrainConfig
from ddfast.distill.batch import Part
from ddfast.distill.method import Method
from ddfast.distill.micro_batch import LiveBytes
from ddfast.distill.trainer import from_noise
from ddfast.errors import DDFastError
from ddfast.models import families
from ddfast.models.blocks import blocks_of, recomputing
from ddfast.models.loading import untrained_teacher
from ddfast.models.protocol import Teacher


class Line(NamedTuple):
    """What grows with the samples of a micro-batch: so much, and so much more for each."""

    fixed: float
    each: float

    def __call__(self, samples: int) -> int:
        return round(self.fixed + self.each * samples)


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Of forward and backward of one micro-batch.

    Attributes:
        activations: bytes that the forward pass leaves for the backward pass.
        peaks: bytes that live at a time, at most, beside parameters, buffers and gradients that were there before: in
            passes without gradient, in the forward pass, and in the backward pass.
        flops: of products: matrices, attention, convolutions, and the flow over the codebook.
    """

    activations: Line
    peaks: tuple[Line, ...]
    flops: Line

    def peak(self, samples: int) -> int:
        """The highest of the peaks, of so many samples."""
        return max(peak(samples) for peak in self.peaks)

    def fitting(self, limit: int) -> int:
        """How many samples at a time stay within so many bytes; 0: not even one."""
        return max(min(math.floor((limit - peak.fixed) / max(peak.each, 1)) for peak in self.peaks), 0)


_SAMPLES = (2, 3)
"""Of the two micro-batches that are rehearsed: one sample alone spares copies that more need."""

_DEPTHS = (2, 3)
"""Blocks of the networks that are rehearsed in the place of deeper ones: each after the first takes the same."""


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

    def cost(
        self,
        method: Method,
        phase: str,
        *,
        precision: str = "float32",
        recompute: bool = False,
    ) -> StepCost:
        """What forward and backward of a micro-batch take, as it grows with the samples, once gradients are there.

        Networks of one depth are rehearsed with few of their blocks, and what one block more takes is added for the
        others: a whole network has thousands of ops, of 0.2 ms each.

        Args:
            method: made of this rehearsal's networks, within `pretending`.
            phase: of the method.
            precision: as in `OptimisationConfig`.
            recompute: as `--parallel.recompute blocks`.
        """
        networks = list({id(network): network for network in (self.teacher, *method.networks.values())}.values())
        depths = {len(blocks_of(network)) for network in networks}
        depth = depths.pop()
        alike = not depths and depth > max(_DEPTHS) and all(_list_of_blocks(network) for network in networks)
        rehearsed = _DEPTHS if alike else (depth,)
        found = []
        for blocks in rehearsed:
            with _shortened(networks, blocks) if alike else contextlib.nullcontext():
                pair = [self._step(method, phase, n, precision, recompute) for n in _SAMPLES]
            found.append([_line(*values) for values in zip(*pair, strict=True)])
        lines = [_at_depth(at, rehearsed, depth) for at in zip(*found, strict=True)]
        return StepCost(activations=lines[0], flops=lines[1], peaks=tuple(lines[2:]))

    def _step(self, method: Method, phase: str, samples: int, precision: str, recompute: bool) -> list[int]:
        """Activations, FLOPs and peaks of one micro-batch."""
        updated = method.networks[phase]
        with self.fake:
            for parameter in updated.parameters():
                parameter.grad = torch.empty_like(parameter)
        live = _Counted()
        as_there = _cuda_autocast(updated) if self.device_type == "cuda" else contextlib.nullcontext()
        with self.fake, private_api.every_call(live.call), as_there:
            part = Part.whole(samples, seeds.generator(0))
            loss, beside = forward_pass(method, phase, part, precision=precision, recompute=recompute)
            activations, live.backward = live.now, True
            loss.backward()
            del loss, beside
        updated.zero_grad(set_to_none=True)
        return [activations, live.flops, *live.peaks]

    def sequence_flops(self) -> int:
        """Of one sequence that the teacher decodes, guidance included: those of a pass that is given all of its tokens.

        A cache computes every token once, as such a pass does; the flow's own work is small beside it.
        """
        live = _Counted()
        with self.fake, private_api.every_call(live.call), torch.no_grad():
            codes = torch.zeros(1, self.teacher.num_tokens, dtype=torch.int64)
            self.teacher.log_probs(self.teacher.condition_of(torch.zeros(1, dtype=torch.int64)), codes)
        return live.flops


def forward_pass(
    method: Method, phase: str, part: Part, *, precision: str = "float32", recompute: bool = False
) -> tuple[Tensor, object]:
    """A micro-batch's forward pass on a CPU, of sequences of one code: its loss, and what lives beside it."""
    teacher = method.roles.teacher
    batch = from_noise(teacher)(part, False)
    batch.codes = torch.zeros(len(part), teacher.num_tokens, dtype=torch.int64)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with recomputing(method.networks[phase], recompute), autocast:
        loss, logged = method.step(phase, batch, part)
    return loss, (batch, logged)


def _line(first: int, second: int) -> Line:
    """Through what the two micro-batches took."""
    few, more = _SAMPLES
    each = (second - first) / (more - few)
    return Line(first - few * each, each)


def _at_depth(lines: Sequence[Line], depths: Sequence[int], depth: int) -> Line:
    """What networks of a depth take, by what those of one or two depths take."""
    if len(lines) == 1:
        return lines[0]
    blocks = (depth - depths[0]) / (depths[1] - depths[0])
    return Line(*(low + blocks * (high - low) for low, high in zip(*lines, strict=True)))


def _list_of_blocks(network: nn.Module) -> nn.ModuleList | None:
    """The list that holds a network's blocks, and nothing else."""
    blocks = blocks_of(network)
    lists = (module for module in network.modules() if isinstance(module, nn.ModuleList))
    return next((found for found in lists if len(found) == len(blocks) and found[0] is blocks[0]), None)


@contextlib.contextmanager
def _shortened(networks: Iterable[nn.Module], depth: int) -> Iterator[None]:
    """Within, networks have their first blocks alone."""
    lists = [blocks for blocks in map(_list_of_blocks, networks) if blocks is not None]
    rest = [list(blocks[depth:]) for blocks in lists]
    for blocks in lists:
        del blocks[depth:]
    try:
        yield
    finally:
        for blocks, others in zip(lists, rest, strict=True):
            blocks.extend(others)


_INDEX = torch.ops.aten.index.Tensor
_BINCOUNT = torch.ops.aten.bincount.default


def _answered(op: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    """An op on tensors without values: a value is 0, a mask chooses everything, no bin has more."""
    if op is private_api.ITEM:
        return 0.0 if arguments[0].dtype.is_floating_point else 0
    if op is _INDEX and any(index is not None and index.dtype == torch.bool for index in arguments[1]):
        given, (mask,) = arguments
        rows = torch.arange(mask.numel(), dtype=torch.int64, device=given.device)
        return op(given.flatten(0, mask.dim() - 1), [rows])
    if op is _BINCOUNT:
        return torch.zeros(arguments[2], dtype=torch.int64, device=arguments[0].device)
    return op(*arguments, **settings)


class _Counted(LiveBytes):
    """Memory by the part of a step in which it peaks, and work.

    (FlopCounterMode itself holds on to the tensors of modules, so that memory would not be what it is.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.backward = 0, False
        self.peaks = [0, 0, 0]

    def do(self, op: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        made = _answered(op, arguments, settings)
        count = _FLOPS.get(op.overloadpacket) or flop_registry.get(op.overloadpacket)
        if count is not None:
            self.flops += count(*arguments, **settings, out_val=made)
        return made

    def see(self, tensor: Tensor, *, new: bool) -> None:
        super().see(tensor, new=new)
        part = 2 if self.backward else int(torch.is_grad_enabled())
        self.peaks[part] = max(self.peaks[part], self.now)


@contextlib.contextmanager
def _cuda_autocast(network: nn.Module) -> Iterator[None]:
    """Within, autocast does as on a GPU, also in blocks that a backward pass computes again: no mode reaches there."""
    blocks = blocks_of(network)

    def forward(own: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        with _CudaAutocast():
            return own(*inputs, **options)

    for block in blocks:
        block.forward = functools.partial(forward, block.forward)
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


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Two products of [B, H, S, K]."""
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Five products, one of which is the forward pass's again."""
    return _attention(query, key, value) * 5 // 2


def _posterior(x: Tensor, t: Tensor, log_probs: Tensor, codebook: Tensor, *_: Any, **__: Any) -> int:
    """Scores of points [..., D] by a codebook [V, D], and the mean of its codes."""
    return 4 * x.shape[:-1].numel() * codebook.numel()


def _posterior_backward(
    grad: Tensor, x: Tensor, t: Tensor, log_probs: Tensor, codebook: Tensor, *_: Any, **__: Any
) -> int:
    """The scores again, the codes along the gradient, and their mean."""
    return 6 * x.shape[:-1].numel() * codebook.numel()


def _nearest(x: Tensor, codebook: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.shape[:-1].numel() * codebook.numel()


_OWN = torch.ops.ddfast
_FLOPS: dict[Any, Callable[..., int]] = {
    private_api.ATTENTION: _attention,
    private_api.ATTENTION_BACKWARD: _attention_backward,
    _OWN.codebook_posterior: _posterior,
    _OWN.codebook_posterior_backward: _posterior_backward,
    _OWN.nearest_code: _nearest,
}
"""Of what PyTorch's table does not have."""

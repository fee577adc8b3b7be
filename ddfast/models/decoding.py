"""The decoding loop: group by group, host in the loop or not.

A step reads where it is from the device and writes its codes where the next step looks for them, so a step that was
captured as a CUDA graph is right at every later position of the same shape. Teachers of one token per group need two
graphs (the condition's step, and all others), VAR one per scale; a scale of guidance of its own asks for another.

Dimensions: B batch, R rows (B, or 2B with guidance), N tokens, G tokens of one group, D code dimension.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, ClassVar, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ddfast import private_api
from ddfast.models.autoregressive import AutoRegressive, Condition
from ddfast.ops import dispatch, draw_codes
from ddfast.ops.common import kernel_dtype
from ddfast.ops.geometry import CodebookGeometry, codebook_geometry
from ddfast.ops.sample_codes import only_codes

Sampler: TypeAlias = Literal["multinomial", "greedy", "flow"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a decoding does, apart from the numbers that go in.

    Attributes:
        batch: B.
        first, stop: groups first .. stop - 1 are decoded; what is before is a prefix.
        sampler: how a code is taken from a distribution.
        scales: of guidance, one per group decoded (1: none).
        filters: temperature, top-k and top-p, by name.
        flow: steps and solver, by name.
        options: what else the teacher's `begin` takes, by name.
    """

    batch: int
    first: int
    stop: int
    sampler: Sampler
    scales: tuple[float, ...]
    filters: tuple[tuple[str, Any], ...]
    flow: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def groups(self) -> range:
        """The groups that are decoded."""
        return range(self.first, self.stop)

    @property
    def guided(self) -> bool:
        """Whether rows without the condition run along."""
        return any(scale != 1.0 for scale in self.scales)

    def scale(self, group: int) -> float:
        """Of guidance, in one group."""
        return self.scales[group - self.first]


@dataclass(kw_only=True)
class Inputs:
    """What goes into a decoding: the condition, codes int64 [B, m] decided before, and what chance there is.

    `chance` is [B, N, D] noise for the flow, [B, N] uniform numbers for draws, None for the likeliest codes.
    """

    condition: Condition
    prefix: Tensor
    chance: Tensor | None

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        conditions = self.condition if isinstance(self.condition, tuple) else (self.condition,)
        return [*conditions, self.prefix, *([] if self.chance is None else [self.chance])]

    def clone(self) -> Inputs:
        """The same in memory of its own."""
        condition = self.condition
        own = tuple(part.clone() for part in condition) if isinstance(condition, tuple) else condition.clone()
        chance = None if self.chance is None else self.chance.clone()
        return Inputs(condition=own, prefix=self.prefix.clone(), chance=chance)  # type: ignore[arg-type]


class Decoding:
    """One decoding under way: `start`, then `step` for every group of the plan; `codes` [B, n] fills up."""

    def __init__(self, teacher: AutoRegressive, plan: Plan, inputs: Inputs) -> None:
        self.teacher, self.plan, self.inputs = teacher, plan, inputs
        self.starts = teacher.group_starts()
        device = teacher.codebook.device
        self.codes = torch.empty(plan.batch, self.starts[plan.stop], dtype=torch.int64, device=device)
        self.token = torch.empty(1, dtype=torch.int64, device=device)  # how many are decided
        self.latest = torch.empty(plan.batch, max(teacher.groups), dtype=torch.int64, device=device)
        self.offsets = torch.arange(max(teacher.groups), dtype=torch.int64, device=device)
        self.state: Any = None

    def start(self) -> None:
        """Take in the condition and the prefix."""
        known = self.inputs.prefix.shape[1]
        self.codes[:, :known] = self.inputs.prefix
        self.token.fill_(known)
        self.state = self.teacher.begin(self.inputs.condition, guided=self.plan.guided, **dict(self.plan.options))

    def step(self, group: int) -> None:
        """Decide one group. Of the group's number only its size, whether it is the first, and its guidance count."""
        teacher, plan = self.teacher, self.plan
        size = teacher.groups[group]
        here = self.token if size == 1 else self.token + self.offsets[:size]
        new = self.inputs.prefix if group == plan.first else self.latest[:, : teacher.groups[group - 1]]
        if not teacher.graphable:  # which promises to keep no codes: these are overwritten
            new = new.clone()
        hidden = teacher.advance(self.state, new)
        hidden, uncond = hidden[: plan.batch], hidden[plan.batch :]
        arguments, scale = dict(plan.filters), plan.scale(group)
        if scale != 1.0 and teacher.has_linear_head:
            hidden = torch.lerp(uncond, hidden, scale)  # uncond + scale (hidden - uncond)
        elif scale != 1.0:
            arguments.update(uncond=uncond, cfg_scale=scale)
        logits = teacher.read_out(hidden)
        chance = self.inputs.chance
        if chance is None:
            codes = draw_codes(logits, logits.new_zeros(logits.shape[:-1]), **{**arguments, "top_k": 1})
        elif plan.sampler == "flow":
            noise = chance.index_select(1, here)
            codes = only_codes(logits, noise, teacher.codebook, **arguments, **dict(plan.flow))
        else:
            codes = draw_codes(logits, chance.index_select(1, here), **arguments)
        torch.clamp_min(codes, 0, out=self.latest[:, :size])  # -1 marks a bad row, and is no index
        self.codes.index_copy_(1, here, codes)
        self.token += size

    def shape(self, group: int) -> tuple[int, float]:
        """What two groups must have in common for one graph to serve both: the same work, apart from the position."""
        uniform = len(self.teacher.groups) == self.teacher.num_tokens
        return (min(group, self.plan.first + 1) if uniform else group), self.plan.scale(group)

    def run(self) -> Tensor:
        """Everything, the host in the loop; returns `codes`."""
        self.start()
        for group in self.plan.groups:
            self.step(group)
        return self.codes


class CudaGraphs:
    """Captures work on one GPU into graphs that share their memory."""

    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}  # cuBLAS keeps a workspace for every stream

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"graph: got True for a teacher on {device}, expected one on a GPU")
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = self._streams.setdefault(device, torch.cuda.Stream(device))

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do the work outside of a graph, as capturing needs it: kernels get loaded."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A function that launches the work again: the same kernels on the same memory."""
        graph = torch.cuda.CUDAGraph()
        # Other threads (one that writes training pairs, say) may go on using the GPU.
        settings: Any = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        # cuBLAS' workspaces are to lie in the graphs' own memory: others may free those that are there by now.
        private_api.clear_cublas_workspaces()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, **settings):
            work()
        private_api.clear_cublas_workspaces()
        return graph.replay


class GraphedDecoding:
    """A decoding of one shape as CUDA graphs: after this, no step needs the host for more than a launch.

    Holds its memory, the KV cache included, until it is dropped.
    """

    def __init__(self, teacher: AutoRegressive, plan: Plan, inputs: Inputs, geometry: CodebookGeometry | None) -> None:
        graphs = CudaGraphs(teacher.codebook.device)
        self.inputs = inputs.clone()
        decoding = Decoding(teacher, plan, self.inputs)
        self.order = [decoding.shape(group) for group in plan.groups]
        one_of_each: dict[tuple[int, float], int] = {}
        for group in plan.groups:
            one_of_each.setdefault(decoding.shape(group), group)

        def once() -> None:
            decoding.start()
            for group in one_of_each.values():
                decoding.step(group)

        graphs.warm_up(once)
        decoding.state = None  # its cache makes room for the graphs' own
        self.start = graphs.capture(decoding.start)
        self.steps = {shape: graphs.capture(partial(decoding.step, group)) for shape, group in one_of_each.items()}
        # A graph holds on to no memory but its own pool's: the rest of what it touches lives as long as this. Not the
        # teacher, which decides how long this lives.
        self.memory = (vars(decoding), geometry)
        decoding.teacher = None  # type: ignore[assignment]
        self.codes = decoding.codes
        self.lock = Lock()

    def run(self, inputs: Inputs) -> Tensor:
        """Decode anew; returns codes int64 [B, n]."""
        with self.lock:
            for own, given in zip(self.inputs.tensors(), inputs.tensors(), strict=True):
                own.copy_(given)
            self.start()
            for shape in self.order:
                self.steps[shape]()
            return self.codes.clone()


KEPT_GRAPHS = 4
"""Shapes of decoding that a teacher keeps captured; the one not used for longest makes room."""

_graphed: WeakKeyDictionary[AutoRegressive, OrderedDict[Any, GraphedDecoding | None]] = WeakKeyDictionary()
"""Per teacher and what a graph depends on; None: met once, and not captured for that."""


def decode(teacher: AutoRegressive, plan: Plan, inputs: Inputs, *, graph: bool | None = None) -> Tensor:
    """Codes int64 [B, n] of a plan; see `Teacher.generate` for `graph`."""
    # Compared with the codebook here, where a GPU is waited for anyway: no step can do that.
    geometry = codebook_geometry(teacher.codebook) if plan.sampler == "flow" else None
    if graph is False or not (graph or teacher.codebook.is_cuda):
        return Decoding(teacher, plan, inputs).run()
    obstacle = _obstacle(teacher, plan, inputs)
    if obstacle and graph:
        raise ValueError(f"graph: got True, but {obstacle}")
    if obstacle:
        return Decoding(teacher, plan, inputs).run()
    kept = _graphed.setdefault(teacher, OrderedDict())
    weights = tuple(tensor.data_ptr() for tensor in (*teacher.parameters(), *teacher.buffers()))
    shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs.tensors())
    key = (plan, shapes, weights, id(geometry))
    met, graphed = key in kept, kept.get(key)
    if graphed is None:
        while len(kept) >= KEPT_GRAPHS and not met:
            kept.popitem(last=False)
        kept[key] = None
        if not (graph or met):
            return Decoding(teacher, plan, inputs).run()
        graphed = kept[key] = GraphedDecoding(teacher, plan, inputs, geometry)
    kept.move_to_end(key)
    return graphed.run(inputs)


def release_graphs(teacher: AutoRegressive) -> None:
    """Give back the memory of a teacher's captured decodings; they are captured again when they are needed."""
    _graphed.pop(teacher, None)


def _obstacle(teacher: AutoRegressive, plan: Plan, inputs: Inputs) -> str:
    """Why a decoding cannot be captured, or an empty string."""
    if not teacher.graphable:
        return f"{type(teacher).__name__} does not say that its steps can be captured (its attribute `graphable`)"
    codebook = teacher.codebook
    if plan.sampler == "flow" and codebook.is_inference():
        return "the teacher was made in inference mode: its codebook counts no writes, and is looked at in every step"
    op = "sample_codes" if plan.sampler == "flow" else "draw_codes"
    tensors = (codebook, next(teacher.parameters(), codebook), inputs.chance)
    dtype = kernel_dtype(*tensors)
    ops = {(op, plan.batch * teacher.groups[group]) for group in plan.groups} | {("decode_attention", plan.batch)}
    for name, rows in sorted(ops):
        if dispatch.choose(name, codebook.device.type, dtype, rows=rows).backend == "reference":
            return f"{name} would run on its reference, which a graph cannot hold; set DDFAST_BACKEND=triton"
    return ""

"""The decoding loop: group by group, host in the loop or not.

A step reads where it is from the device and writes its codes where the next step looks for them, so a step that was
captured as a CUDA graph is right at every later position of the same shape. Teachers of one token per group need two
graphs (the condition's step, and all others), VAR one per scale; a scale of guidance of its own asks for another.

Dimensions: B batch, R rows (B, or 2B with guidance), N tokens, G tokens of one group, D code dimension.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
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
from ddfast.ops.dispatch import Asked
from ddfast.ops.geometry import CodebookGeometry, codebook_geometry
from ddfast.ops.sample_codes import only_codes

Sampler: TypeAlias = Literal["multinomial", "greedy", "flow"]
Choices: TypeAlias = tuple[tuple[str, int, str, str], ...]
"""Op, rows, backend and its reason, of all that the steps of a decoding ask for."""


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
        self.state: Any = None

    def start(self) -> None:
        """Take in the condition and the prefix."""
        known = self.inputs.prefix.shape[1]
        self.codes[:, :known] = self.inputs.prefix
        self.token.fill_(known)
        self.state = self.teacher.begin(self.inputs.condition, guided=self.plan.guided, **dict(self.plan.options))

    def step(self, group: int) -> None:
        """Decide one group. Where groups have one token each, its number only tells guidance, and the first of them."""
        teacher, plan = self.teacher, self.plan
        size = teacher.groups[group]
        new = self.inputs.prefix if group == plan.first else self.latest[:, : teacher.groups[group - 1]]
        if not teacher.graphable:  # which promises to keep no codes: these are overwritten
            new = new.clone()
        hidden = teacher.advance(self.state, new)
        logits, guidance = read_guided(teacher, hidden, plan.batch, plan.scale(group))
        arguments = dict(plan.filters) | guidance
        chance = self._chance(group)
        if chance is None:
            codes = draw_codes(logits, logits.new_zeros(logits.shape[:-1]), **{**arguments, "top_k": 1})
        elif plan.sampler == "flow":
            codes = only_codes(logits, chance, teacher.codebook, **arguments, **dict(plan.flow))
        else:
            codes = draw_codes(logits, chance, **arguments)
        torch.clamp_min(codes, 0, out=self.latest[:, :size])  # -1 marks a bad row, and is no index
        if teacher.one_by_one:
            self.codes.index_copy_(1, self.token, codes)
            self.token += 1
        else:
            self.codes[:, self.starts[group] : self.starts[group + 1]] = codes

    def _chance(self, group: int) -> Tensor | None:
        """The group's part of what chance there is; one by one, the device knows which."""
        chance = self.inputs.chance
        if chance is None:
            return None
        if self.teacher.one_by_one:
            return chance.index_select(1, self.token)
        return chance[:, self.starts[group] : self.starts[group + 1]]

    def shape(self, group: int) -> tuple[int, float]:
        """What two groups must have in common for one graph to serve both: the same work, apart from the position."""
        return (min(group, self.plan.first + 1) if self.teacher.one_by_one else group), self.plan.scale(group)

    def run(self) -> Tensor:
        """Everything, the host in the loop; returns `codes`."""
        self.start()
        for group in self.plan.groups:
            self.step(group)
        return self.codes


def check_decoded(codes: Tensor) -> None:
    """Raise `ValueError` where a kernel on a GPU marked a code [B, N] that it could not draw, and went on."""
    if bool((codes < 0).any()):
        image, token = (codes < 0).nonzero()[0].tolist()
        what = "its logits or noise hold NaN or infinite values; check the teacher's weights and precision"
        raise ValueError(f"token {token} of image {image} has no code: {what}")


def read_guided(
    teacher: AutoRegressive, hidden: Tensor, batch: int, scale: float | Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """Logits [B, G, V] of what a teacher's pass returned for R rows, and the guidance that is left to `filter_logits`.

    Args:
        teacher: whose pass it was.
        hidden: [R, G, W], or logits [R, G, V]; the first B rows have the condition.
        batch: B.
        scale: of guidance; 1: none; a tensor [B, G]: each token's own.
    """
    hidden, uncond = hidden[:batch], hidden[batch:]
    if not isinstance(scale, Tensor):
        if scale == 1.0:
            return teacher.read_out(hidden), {}
        if teacher.has_linear_head:  # uncond + scale (hidden - uncond)
            return teacher.read_out(torch.lerp(uncond, hidden, scale)), {}
    elif teacher.has_linear_head:
        mixed = torch.lerp(uncond.float(), hidden.float(), scale[..., None])
        return teacher.read_out(mixed.type_as(hidden)), {}
    return teacher.read_out(hidden), {"uncond": uncond, "cfg_scale": scale}


class CudaGraphs:
    """Captures work on one GPU into graphs that share their memory. One thread at a time makes one: `_guard`."""

    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}  # cuBLAS keeps a workspace for every stream

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"graph: got True for a teacher on {device}, expected one on a GPU")
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        self.stream = self._streams[device]
        self.done = torch.cuda.Event()

    @contextlib.contextmanager
    def turn(self, *given: Tensor) -> Iterator[None]:
        """Within, the current stream works on the graphs' memory: after the turn before, on whatever stream that was.

        Args:
            given: tensors that are read: their memory is given to nobody else before that, whoever lets go of them.
        """
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.done)
        try:
            yield
        finally:
            self.done.record(stream)
            for tensor in given:
                tensor.record_stream(stream)

    def wait(self) -> None:
        """Let the host wait for the end of the last turn."""
        self.done.synchronize()

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
        self.graphs = CudaGraphs(teacher.codebook.device)
        self.lock = Lock()
        with self.graphs.turn(*inputs.tensors()):
            self._capture(teacher, plan, inputs.clone(), geometry)

    def _capture(self, teacher: AutoRegressive, plan: Plan, own: Inputs, geometry: CodebookGeometry | None) -> None:
        self.inputs, graphs = own, self.graphs
        decoding = Decoding(teacher, plan, own)
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

    def run(self, inputs: Inputs) -> Tensor:
        """Decode anew, on any stream of any thread; returns codes int64 [B, n]."""
        # The lock is the host's: it orders what is launched, and a turn orders what runs.
        with self.lock, self.graphs.turn(*inputs.tensors()):
            for own, given in zip(self.inputs.tensors(), inputs.tensors(), strict=True):
                own.copy_(given)
            self.start()
            for shape in self.order:
                self.steps[shape]()
            return self.codes.clone()

    def __del__(self) -> None:
        # Others get the memory at once, on whatever stream: no replay may still be under way there.
        with contextlib.suppress(AttributeError, RuntimeError):  # half made; at the end of the process
            self.graphs.wait()


KEPT_GRAPHS = 4
"""Shapes of decoding that a teacher keeps captured; the one not used for longest makes room."""

_graphed: WeakKeyDictionary[AutoRegressive, OrderedDict[Any, GraphedDecoding | None]] = WeakKeyDictionary()
"""Per teacher and what a graph depends on; None: met once, and not captured for that."""

_guard = Lock()
"""Of `_graphed`, and of capturing: all of a device's graphs are captured on one stream."""


def decode(teacher: AutoRegressive, plan: Plan, inputs: Inputs, *, graph: bool | None = None) -> Tensor:
    """Codes int64 [B, n] of a plan; see `Teacher.generate` for `graph`."""
    # Compared with the codebook here, where a GPU is waited for anyway: no step can do that.
    geometry = codebook_geometry(teacher.codebook) if plan.sampler == "flow" else None
    if graph is False or not (graph or teacher.codebook.is_cuda):
        return Decoding(teacher, plan, inputs).run()
    choices = _choices(teacher, plan, inputs)
    obstacle = _obstacle(teacher, plan, choices)
    if obstacle and graph:
        raise ValueError(f"graph: got True, but {obstacle}")
    graphed = None if obstacle else _captured(teacher, plan, inputs, geometry, choices, now=bool(graph))
    return Decoding(teacher, plan, inputs).run() if graphed is None else graphed.run(inputs)


def release_graphs(teacher: AutoRegressive) -> None:
    """Give back the memory of a teacher's captured decodings; they are captured again when they are needed."""
    with _guard:
        _graphed.pop(teacher, None)


def _captured(
    teacher: AutoRegressive,
    plan: Plan,
    inputs: Inputs,
    geometry: CodebookGeometry | None,
    choices: Choices,
    *,
    now: bool,
) -> GraphedDecoding | None:
    """The decoding as graphs, captured in the second call that asks for it, or `now`; None: in the first."""
    weights = tuple(tensor.data_ptr() for tensor in (*teacher.parameters(), *teacher.buffers()))
    shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs.tensors())
    key = (plan, shapes, weights, id(geometry), choices, _precision())
    with _guard:
        kept = _graphed.setdefault(teacher, OrderedDict())
        met, graphed = key in kept, kept.get(key)
        if graphed is None:
            while len(kept) >= KEPT_GRAPHS and not met:
                kept.popitem(last=False)
            kept[key] = None
            if not (now or met):
                return None
            graphed = kept[key] = GraphedDecoding(teacher, plan, inputs, geometry)
        kept.move_to_end(key)
        return graphed


def _choices(teacher: AutoRegressive, plan: Plan, inputs: Inputs) -> Choices:
    """The backends that the steps of a decoding will run by, which a graph holds on to."""
    codebook, rows = teacher.codebook, plan.batch * (2 if plan.guided else 1)
    sampling = "sample_codes" if plan.sampler == "flow" else "draw_codes"
    dim = teacher.code_dim if plan.sampler == "flow" else 0
    dtype = kernel_dtype(next(teacher.parameters(), codebook), codebook, inputs.chance)
    asked: set[tuple[str, Asked]] = set()
    for size in {teacher.groups[group] for group in plan.groups}:
        asked |= {(sampling, Asked(plan.batch * size, dim, len(codebook))), *teacher.step_ops(rows, size).items()}
    device = codebook.device
    dispatch.prepare({(op, dtype, sizes.dim) for op, sizes in asked}, device)
    chosen = [(op, sizes.rows, dispatch.choose(op, device, dtype, **sizes._asdict())) for op, sizes in sorted(asked)]
    return tuple((op, rows, choice.backend, choice.reason) for op, rows, choice in chosen)


def _precision() -> tuple[str, str]:
    """How products of float32 are rounded: what else a graph holds on to."""
    backends: Any = torch.backends
    return backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision


def _obstacle(teacher: AutoRegressive, plan: Plan, choices: Choices) -> str:
    """Why a decoding cannot be captured, or an empty string."""
    if not teacher.graphable:
        return f"{type(teacher).__name__} does not say that its steps can be captured (its attribute `graphable`)"
    if plan.sampler == "flow" and teacher.codebook.is_inference():
        return "the teacher was made in inference mode: its codebook counts no writes, and is looked at in every step"
    for op, _, backend, reason in choices:
        waits = op in ("sample_codes", "draw_codes") or (op == "decode_attention" and teacher.one_by_one)
        if waits and backend == "reference":
            return f"{op} would run on its reference, which a graph cannot hold ({reason}); see `ddfast doctor`"
    return ""

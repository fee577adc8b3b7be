"""What a training takes, before it is started: memory, micro-batches, work, hours and disk of every stage.

Memory is in bytes, work in FLOPs (a multiplication and an addition are two).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ddfast.config import OptimisationConfig, PretrainedTeacherConfig, SettingError, TrainConfig
from ddfast.distill.checkpoints import KEPT
from ddfast.distill.dd1 import DD1
from ddfast.distill.dd2 import Adaptation, Matching, Tuning
from ddfast.distill.lpips import LPIPS
from ddfast.distill.memory_model import (
    USABLE,
    Size,
    State,
    choose_strategy,
    gathered_bytes,
    optimizer_bytes,
    part_of,
    shards_teacher,
    state_bytes,
)
from ddfast.distill.method import Method, Roles
from ddfast.distill.micro_batch import needs_recompute
from ddfast.distill.rehearsal import Rehearsal, StepCost
from ddfast.distill.stages import new_network
from ddfast.errors import DDFastError
from ddfast.models.flow_network import FlowNetwork
from ddfast.models.layers import num_parameters
from ddfast.models.loading import start_student
from ddfast.models.protocol import Teacher
from ddfast.pipeline import METHODS, needs_tuning
from ddfast.trajectories.memory import sample_bytes


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """FLOPs per second of dense products, and bytes per second of memory."""

    bfloat16: float
    float32: float
    bandwidth: float


GPUS = {
    "a100": Gpu(bfloat16=312e12, float32=19.5e12, bandwidth=2.039e12),
    "h100": Gpu(bfloat16=989e12, float32=67e12, bandwidth=3.35e12),
    "h200": Gpu(bfloat16=989e12, float32=67e12, bandwidth=4.8e12),
}
"""Source: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM and H200 SXM: bfloat16 on tensor cores without sparsity,
float32 without tensor cores (PyTorch's default). The papers' A800 computes as the A100."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a training is to run.

    Attributes:
        devices: of the whole job.
        nodes: that they are in, in equal numbers.
        memory: of a device, in bytes.
        gpu: what a device can do.
        mfu: share of its FLOPs per second that training reaches.
    """

    devices: int
    nodes: int
    memory: int
    gpu: Gpu
    mfu: float

    def __post_init__(self) -> None:
        for name in ("devices", "nodes", "memory", "mfu"):
            if not getattr(self, name) > 0:
                raise SettingError(f"{name}: got {getattr(self, name)}, expected a positive number")
        if self.devices % self.nodes:
            raise SettingError(f"devices: got {self.devices}, expected a multiple of the {self.nodes} nodes")
        if self.mfu > 1:
            raise SettingError(f"mfu: got {self.mfu}, expected a share of at most 1")

    def hours(self, flops: float, precision: str) -> float:
        """That all devices together take for so much work."""
        return flops / (self.devices * self.mfu * getattr(self.gpu, precision)) / 3600


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """A phase of a stage, on one device unless said otherwise.

    Attributes:
        phase: its name; empty: of a stage without training.
        steps: of it.
        micro_batch: samples at a time.
        micro_batches: of a step.
        recompute: none or blocks.
        activations: bytes that a micro-batch's forward pass keeps.
        gathered: bytes of sharded networks that lie there whole for a moment.
        peak: bytes at the most.
        flops: of a step, of all devices, recomputation included.
        hours: of all steps.
    """

    phase: str
    steps: int
    micro_batch: int
    micro_batches: int
    recompute: str
    activations: int
    gathered: int
    peak: int
    flops: float
    hours: float


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A stage.

    Attributes:
        stage: its name.
        strategy: replicate or shard.
        teacher: bytes on one device.
        state: bytes of the trained networks on one device.
        phases: as they follow.
        checkpoint: bytes of one, all devices together.
        decoding_hours: for the sequences that the teacher makes for it.
        advice: what must change for it to fit; empty: it fits.
    """

    stage: str
    strategy: str
    teacher: int
    state: State
    phases: list[PhasePlan]
    checkpoint: int = 0
    decoding_hours: float = 0.0
    advice: str = ""

    @property
    def peak(self) -> int:
        """Bytes on one device at the most."""
        return max(phase.peak for phase in self.phases)

    @property
    def hours(self) -> float:
        """Of decoding and training."""
        return self.decoding_hours + sum(phase.hours for phase in self.phases)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Of a run.

    Attributes:
        parameters: numbers of them, by network.
        stages: as they follow.
        limit: bytes that tensors may take on one device.
        disk: bytes by what they are for.
        notes: what else is worth knowing before.
    """

    recipe: str
    method: str
    machine: Machine
    parameters: dict[str, int]
    stages: list[StagePlan]
    limit: int
    disk: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return not any(stage.advice for stage in self.stages)

    @property
    def hours(self) -> float:
        """Of all stages."""
        return sum(stage.hours for stage in self.stages)


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """Bytes of "80GiB", "24 GB" or "81920MiB".

    Raises:
        ValueError: it is something else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|)\s*", text, re.IGNORECASE)
    if not found:
        raise ValueError(f"memory: got {text!r}, expected a size such as 80GiB or 24GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def plan(config: TrainConfig, machine: Machine) -> Plan:
    """Of a configuration's run by its method; nothing is read, written or trained.

    Raises:
        DDFastError: the method is unknown, or has no plan.
    """
    if config.method not in METHODS:
        raise DDFastError(f"unknown method {config.method!r}; known: {', '.join(METHODS)}")
    if config.method not in _NETWORKS:
        raise DDFastError(f"method {config.method!r} has no plan; planned are {', '.join(_NETWORKS)}")
    config = _without_files(config)
    rehearsal = Rehearsal(config, lambda teacher: _NETWORKS[config.method](config, teacher))
    sizes = {name: Size.of(network) for name, network in rehearsal.networks.items()}
    planner = _Planner(config, machine, rehearsal, sizes)
    stages = list(planner.stages())
    return Plan(
        recipe=config.recipe,
        method=config.method,
        machine=machine,
        parameters={name: size.parameters for name, size in sizes.items()}
        | {"teacher": num_parameters(rehearsal.teacher)},
        stages=stages,
        limit=planner.limit,
        disk=planner.disk(stages),
        notes=planner.notes(stages),
    )


def _without_files(config: TrainConfig) -> TrainConfig:
    """The configuration without what its weights would be read from, on the device of shapes."""
    made = copy.deepcopy(config)
    made.device = "meta"
    if isinstance(made.teacher, PretrainedTeacherConfig):
        made.teacher.weights, made.teacher.random_weights = "", True
    if hasattr(made.teacher, "captions"):
        made.teacher.captions = ""
    return made


def _dd1_networks(config: TrainConfig, teacher: Teacher) -> dict[str, nn.Module]:
    return {"student": start_student(teacher, recycles=config.dd1.recycles)}


def _dd2_networks(config: TrainConfig, teacher: Teacher) -> dict[str, nn.Module]:
    networks: dict[str, nn.Module] = {"student": new_network(config, teacher, recycles=config.dd2.recycles)}
    if config.dd2.match.score_weight:
        networks["guidance"] = new_network(config, teacher)
    return networks


_NETWORKS: dict[str, Callable[[TrainConfig, Teacher], dict[str, nn.Module]]] = {
    "dd1": _dd1_networks,
    "dd2": _dd2_networks,
}
"""The networks that a method trains."""


class _Planner:
    """The stages of one run on one machine."""

    def __init__(self, config: TrainConfig, machine: Machine, rehearsal: Rehearsal, sizes: dict[str, Size]) -> None:
        self.config, self.machine, self.rehearsal, self.sizes = config, machine, rehearsal, sizes
        self.teacher = rehearsal.teacher
        tensors = (*self.teacher.parameters(), *self.teacher.buffers())
        self.teacher_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.limit = int(USABLE * machine.memory)
        with rehearsal.pretending():
            self.decoded_bytes = sample_bytes(self.teacher)
        self.sequence_flops = rehearsal.sequence_flops()

    def stages(self) -> Iterator[StagePlan]:
        """Those of the method, in the order of `ddfast.pipeline`."""
        config, networks = self.config, self.rehearsal.networks
        student, teacher = networks["student"], self.teacher
        if config.method == "dd1":
            if config.dd1.pair_iterations:
                yield self._trajectories()
            yield self._stage("distillation", lambda: self._dd1(student), config.dd1)
            return
        dd2 = config.dd2
        assert isinstance(student, FlowNetwork)
        guidance = networks.get("guidance")
        assert guidance is None or isinstance(guidance, FlowNetwork)
        roles = Roles(student=student, teacher=teacher)
        if needs_tuning(config) and dd2.tune.source == "store":
            yield self._trajectories()
        if student.looks_up:
            yield self._stage("adaptation", lambda: Adaptation(roles, dd2.adapt), dd2.adapt, decodes=True)
        if needs_tuning(config):
            decodes = dd2.tune.source == "teacher"
            yield self._stage("tuning", lambda: Tuning(roles, dd2.tune), dd2.tune, decodes=decodes)
        roles = Roles(student=student, teacher=teacher, guidance=guidance)
        yield self._stage("matching", lambda: Matching(roles, dd2.match), dd2.match)

    def _dd1(self, student: Any) -> DD1:
        dd1 = self.config.dd1
        method = DD1(
            Roles(student=student, teacher=self.teacher), dataclasses.replace(dd1, lpips_vgg="", lpips_linear="")
        )
        if dd1.lpips_vgg:  # its files are not read
            method.lpips = LPIPS().requires_grad_(False)
        return method

    def _trajectories(self) -> StagePlan:
        """Pairs are independent: every device decodes its own, as many at a time as fit."""
        settings, machine = self.config.trajectories, self.machine
        fits = (self.limit - self.teacher_bytes) // self.decoded_bytes
        batch = min(settings.batch_size or fits, settings.shard_size)
        peak = self.teacher_bytes + max(batch, 1) * self.decoded_bytes
        phase = PhasePlan(
            phase="",
            steps=math.ceil(settings.count / max(batch, 1)),
            micro_batch=max(batch, 1),
            micro_batches=1,
            recompute="none",
            activations=max(batch, 1) * self.decoded_bytes,
            gathered=0,
            peak=peak,
            flops=max(batch, 1) * self.sequence_flops,
            hours=self._decoding_hours(settings.count, max(batch, 1)),
        )
        none = State(parameters=0, gradients=0, moments=0, average=0)
        advice = "" if peak <= self.limit else _needs(machine, peak)
        return StagePlan(
            stage="trajectories", strategy="replicate", teacher=self.teacher_bytes, state=none, phases=[phase],
            advice=advice,
        )  # fmt: skip

    def _decoding_hours(self, sequences: int, batch: int) -> float:
        """By work, or where that takes longer by reading the teacher's weights once for every group of a batch."""
        machine, teacher = self.machine, self.teacher
        weights = next(parameter for name, parameter in teacher.named_parameters() if "tokenizer" not in name)
        precision = "float32" if weights.dtype == torch.float32 else "bfloat16"
        batches = sequences / (batch * machine.devices)
        reading = batches * len(teacher.groups) * self.teacher_bytes / machine.gpu.bandwidth / 3600
        return max(machine.hours(sequences * self.sequence_flops, precision), reading)

    def _stage(
        self, name: str, make: Callable[[], Method], config: OptimisationConfig, *, decodes: bool = False
    ) -> StagePlan:
        """A stage by the strategy that is set; by auto, sharded also where it does not fit otherwise."""
        with self.rehearsal.pretending():
            method = make()

        @functools.cache
        def cost(phase: str, recompute: bool) -> StepCost:
            return self.rehearsal.cost(method, phase, precision=config.precision, recompute=recompute)

        asked, node = self.config.parallel.strategy, self.machine.devices // self.machine.nodes
        states = {
            role: state_bytes(self.sizes[role], config.optimizer, averaged=role == "student")
            for role in self._trained(method)
        }
        whole = sum(state.total for state in states.values()) + self.teacher_bytes
        strategy = choose_strategy(whole, self.limit, node) if asked == "auto" else asked
        made = self._by(strategy, name, method, config, states, cost, decodes)
        if made.advice and asked == "auto" and strategy == "replicate" and node > 1:
            made = self._by("shard", name, method, config, states, cost, decodes)
        return made

    def _trained(self, method: Method) -> list[str]:
        """Names of the networks that a method trains."""
        own = {id(network) for network in method.networks.values()}
        return [name for name, network in self.rehearsal.networks.items() if id(network) in own]

    def _by(
        self,
        strategy: str,
        name: str,
        method: Method,
        config: OptimisationConfig,
        states: dict[str, State],
        cost: Callable[[str, bool], StepCost],
        decodes: bool,
    ) -> StagePlan:
        """A stage by one strategy."""
        machine = self.machine
        shards = machine.devices // machine.nodes if strategy == "shard" else 1
        local = _sum(_part_of_state(state, shards) for state in states.values())
        teacher = self.teacher_bytes
        if shards > 1 and shards_teacher(local.total, teacher, self.limit):
            teacher = part_of(teacher, shards)
        held = local.total + teacher
        steps = Counter(method.phase(step) for step in range(method.total))
        part = part_of(config.batch_size, machine.devices)
        phases, sequences = [], 0
        for phase, count in steps.items():
            updated = next(role for role in states if self.rehearsal.networks[role] is method.networks[phase])
            others = [self.sizes[role] for role in states if role != updated]
            gathered = gathered_bytes(self.sizes[updated], *others) if shards > 1 else 0
            reads = decodes and method.reads_codes(phase)
            room = self.limit - held - gathered
            drawn = self.decoded_bytes if reads else 0
            size, recompute = self._micro_batch(functools.partial(cost, phase), part, room, drawn)
            taken = cost(phase, recompute)
            parts = math.ceil(part / max(size, 1))
            micro = math.ceil(part / parts)
            update = optimizer_bytes(part_of(self.sizes[updated].parameters, shards))
            peak = held + max(gathered + max(taken.peak(micro), micro * drawn), update)
            flops = machine.devices * parts * taken.flops.fixed + config.batch_size * taken.flops.each
            sequences += count * config.batch_size if reads else 0
            phases.append(
                PhasePlan(
                    phase=phase,
                    steps=count,
                    micro_batch=micro,
                    micro_batches=parts,
                    recompute="blocks" if recompute else "none",
                    activations=taken.activations(micro),
                    gathered=gathered,
                    peak=peak,
                    flops=flops,
                    hours=machine.hours(count * flops, config.precision),
                )
            )
        highest = max(phase.peak for phase in phases)
        whole = sum(state.total for state in states.values())
        return StagePlan(
            stage=name,
            strategy=strategy,
            teacher=teacher,
            state=local,
            phases=phases,
            checkpoint=sum(state.saved for state in states.values()),
            decoding_hours=self._decoding_hours(sequences, min(phase.micro_batch for phase in phases)),
            advice="" if highest <= self.limit else self._advice(strategy, phases, whole, held, teacher),
        )

    def _micro_batch(self, cost: Callable[[bool], StepCost], part: int, room: int, drawn: int) -> tuple[int, bool]:
        """Samples at a time, of the `part` of a process, and whether blocks are computed again; 0: none fit."""
        asked = self.config.parallel

        def fitting(recompute: bool) -> int:
            fits = cost(recompute).fitting(room)
            return min(fits, room // drawn if drawn else fits, part)

        if asked.recompute == "none":
            recompute = False
        else:
            recompute = asked.recompute == "blocks" or needs_recompute(fitting(False), part, asked.micro_batch)
        if asked.micro_batch:
            return min(asked.micro_batch, part), recompute
        return max(fitting(recompute), 0), recompute

    def _advice(self, strategy: str, phases: list[PhasePlan], whole: int, held: int, teacher: int) -> str:
        """What must change for a stage to fit.

        Args:
            strategy, phases: as they are planned.
            whole: bytes of the trained networks, unsharded.
            held: bytes of networks that a device holds.
            teacher: those of them that are the teacher's.
        """
        peak = max(phase.peak for phase in phases)
        asked = self.config.parallel
        ways = []
        if asked.micro_batch > 1:
            ways.append("a smaller --parallel.micro-batch")
        if any(phase.recompute == "none" for phase in phases):
            ways.append("--parallel.recompute blocks")
        if strategy == "replicate" and self.machine.devices > self.machine.nodes:
            ways.append("--parallel.strategy shard")
        room = self.limit - teacher - (peak - held)
        if room > 0 and (strategy == "shard" or self.machine.devices == self.machine.nodes):
            ways.append(f"{math.ceil(whole / room)} devices in a node, which hold a part of the networks each")
        ways.append(_needs(self.machine, peak))
        return ", or ".join(ways)

    def disk(self, stages: list[StagePlan]) -> dict[str, int]:
        """Bytes of what a run leaves, and of what it keeps while it runs."""
        names = [stage.stage for stage in stages]
        settings, teacher, found = self.config.trajectories, self.teacher, {}
        if "trajectories" in names:
            codes = 1 if teacher.num_codes <= 2**8 else 2 if teacher.num_codes <= 2**16 else 4
            noise = 4 * teacher.code_dim if settings.store_noise else 0
            found["pairs"] = settings.count * (teacher.num_tokens * (codes + noise) + 16)  # and condition and index
        found["checkpoints"] = KEPT * max(stage.checkpoint for stage in stages)
        student = 4 * self.sizes["student"].parameters
        results = 2 * student + 4 * self.sizes["guidance"].parameters if "guidance" in self.sizes else 2 * student
        found["results"] = results + student * sum(name in names for name in ("adaptation", "tuning"))
        return found

    def notes(self, stages: list[StagePlan]) -> list[str]:
        """What else is worth knowing before."""
        return self._decoding_note(stages) + self._evaluation_note()

    def _evaluation_note(self) -> list[str]:
        """Batches of the evaluation that the teacher cannot decode: at the end of a run it is late to learn that."""
        settings, student = self.config.evaluation, 4 * self.sizes["student"].parameters
        asked = max(settings.batch_size, *settings.batch_sizes)
        fits = max((self.limit - self.teacher_bytes - student) // self.decoded_bytes, 1)
        if asked <= fits:
            return []
        flags = f"--evaluation.batch-size {fits} --evaluation.batch-sizes 1 {fits}"
        return [f"evaluation: the teacher decodes {fits} samples at a time, not {asked}: give {flags}"]

    def _decoding_note(self, stages: list[StagePlan]) -> list[str]:
        """What makes it shorter, where decoding in float32 takes a good part of the hours."""
        trained = sum(phase.hours for stage in stages for phase in stage.phases if phase.phase)
        decoding = sum(stage.hours for stage in stages) - trained
        gpu, precise = self.machine.gpu, getattr(self.config.teacher, "dtype", "") == "float32"
        if not precise or decoding < trained / 4 or gpu.bfloat16 <= gpu.float32:
            return []
        said = f"the teacher decodes in float32, {decoding:.0f} of the hours: --teacher.dtype bfloat16 makes it shorter"
        on_the_fly = any(stage.decoding_hours for stage in stages)
        return [said + (", and so does --dd2.tune.source store, which decodes once" if on_the_fly else "")]


def _part_of_state(state: State, shards: int) -> State:
    """What a process holds of it."""
    return State(**{item.name: part_of(getattr(state, item.name), shards) for item in dataclasses.fields(state)})


def _sum(states: Iterator[State]) -> State:
    held = list(states)
    names = [item.name for item in dataclasses.fields(State)]
    return State(**{name: sum(getattr(state, name) for state in held) for name in names})


def _needs(machine: Machine, peak: int) -> str:
    return f"devices of {math.ceil(peak / USABLE / 2**30)} GiB"


# For people and programs ---------------------------------------------------------------------------------------------


def lines(found: Plan) -> list[str]:
    """A table, and what it comes to."""
    machine = found.machine
    many = " + ".join(f"{name} {number / 1e6:.0f} M" for name, number in found.parameters.items())
    teacher = _gib(found.stages[-1].teacher)
    head = (
        f"{found.recipe}, {found.method}: {machine.devices} device{_s(machine.devices)} in {machine.nodes} "
        f"node{_s(machine.nodes)}, {machine.memory / 2**30:g} GiB each; parameters: {many}"
    )
    columns = (
        "stage", "strategy", "micro-batch", "recompute", "weights", "grads", "moments", "average", "activations",
        "peak", "TFLOP/step", "steps", "hours",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [columns]
    for stage in found.stages:
        state = stage.state
        for phase in stage.phases:
            lasting = (state.parameters, state.gradients, state.moments, state.average)
            size = (*lasting, phase.activations, phase.peak)
            micro = f"{phase.micro_batches} x {phase.micro_batch}"
            title = f"{stage.stage}, {phase.phase}" if phase.phase else stage.stage
            rows.append(
                (title, stage.strategy, micro, phase.recompute, *map(_gib, size),
                 f"{phase.flops / 1e12:.3g}", f"{phase.steps}", f"{phase.hours:.1f}")
            )  # fmt: skip
        if stage.decoding_hours:
            rows.append((f"{stage.stage}, decoding", *[""] * 11, f"{stage.decoding_hours:.1f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    table = [
        "  ".join(
            cell.ljust(width) if column < 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    disk = ", ".join(f"{name} {_gib(number)} GiB" for name, number in found.disk.items())
    said = [f"does not fit: {stage.stage}: give it {stage.advice}" for stage in found.stages if stage.advice]
    fits = f"fits: at most {_gib(max(stage.peak for stage in found.stages))} of {_gib(found.limit)} GiB"
    share = f"{USABLE:.0%} of a device's memory; the rest is for CUDA, its libraries and fragmentation"
    return [
        head,
        "",
        *table,
        "",
        f"GiB on one device (peak: with the teacher's {teacher}, and what lies there for a while);",
        "micro-batches are one device's, FLOPs and hours those of all",
        f"{found.hours:.0f} hours at {machine.mfu:.0%} of the devices' FLOPs per second, evaluation not included",
        f"disk: {disk} (the last {KEPT} checkpoints)",
        *found.notes,
        *(said or [f"{fits} ({share})"]),
    ]


def _gib(number: float) -> str:
    """In GiB, at least two digits that count."""
    share = number / 2**30
    return f"{share:.1f}" if share >= 1 or not share else f"{share:.2g}"


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def as_json(found: Plan) -> dict[str, Any]:
    """All figures: bytes, FLOPs, hours."""
    told = dataclasses.asdict(found)
    for stage, made in zip(told["stages"], found.stages, strict=True):
        stage |= {"peak": made.peak, "hours": made.hours, "fits": not made.advice}
    return told | {"hours": found.hours, "fits": found.fits}

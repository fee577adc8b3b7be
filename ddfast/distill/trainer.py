"""The training loop of every distillation stage: optimizers, moving average, log, alarms and exact resume."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddfast import processes, seeds
from ddfast.config import OptimisationConfig, ParallelConfig, TrainConfig
from ddfast.distill import checkpoints
from ddfast.distill.batch import Batch, Draw, Part
from ddfast.distill.checkpoints import Checkpoints
from ddfast.distill.memory_model import USABLE, Size, choose_strategy, part_of, shards_teacher, state_bytes
from ddfast.distill.method import ExponentialMovingAverage, Method
from ddfast.distill.micro_batch import MicroBatch, choose, missing_bytes
from ddfast.distill.sharding import Spread
from ddfast.distill.tracking import stage_log
from ddfast.errors import DDFastError
from ddfast.interruption import Wishes, deferred
from ddfast.messages import warn
from ddfast.models.autoregressive import SamplingDefaults
from ddfast.models.blocks import recomputing
from ddfast.models.protocol import Teacher
from ddfast.optimizers import optimizers, step_at
from ddfast.progress import Progress
from ddfast.tracing import span
from ddfast.trajectories.memory import fitting, free_bytes
from ddfast.trajectories.store import Trajectories

ALARM_CHECKPOINT = "checkpoint-before-alarm"


def optimise(
    method: Method,
    config: OptimisationConfig,
    draw: Draw,
    out: Path,
    *,
    stage: str,
    seed: int,
    identity: str,
    run: TrainConfig | None = None,
    ema_decay: float = 0.0,
    watch_every: int = 0,
    progress: Progress | None = None,
) -> ExponentialMovingAverage:
    """Run a stage; returns the moving average of the student (with `ema_decay` 0: its weights as they are).

    Every `checkpoint_every` steps, and when interrupted, the whole state goes to a folder in `out/checkpoints`; a later
    call with the same settings continues from there and ends with the same weights, with as many processes bit for bit
    on a CPU. Step k's batch and randomness depend on (seed, k) and a sample's number alone. `out/metrics.jsonl` gets a
    line every `log_every` steps.

    Of several processes (`ddfast.processes`), each makes a part of every batch; the networks stay spread over them
    (`ddfast.distill.sharding`), and so is the average that is returned.

    Args:
        method: its networks are trained in place.
        config: optimizer, batches, log and checkpoints.
        draw: makes the batches.
        out: folder of the run.
        stage: its name, in the log and in the checkpoint.
        seed: of every step's randomness.
        identity: of the settings; a checkpoint of others is refused.
        run: settings of the run that the stage is of: how the work is shared, and where figures go; None: the defaults.
        ema_decay: of the student's moving average.
        watch_every: steps between the method's looks at its samples; 0: none. What it finds alarming is printed, and
            the last checkpoint before it is kept as `checkpoint-before-alarm`.
        progress: called as progress(done, total, text).

    Raises:
        DDFastError: the checkpoint is of other settings, the loss is no longer finite, or the batch has less than a
            sample per process.
        KeyboardInterrupt: Ctrl-C or SIGTERM (`ddfast.interruption.Terminated`) came to any process; all is saved.
    """
    if config.batch_size < processes.count():
        raise DDFastError(
            f"{stage}: batch_size {config.batch_size} is less than a sample for each of {processes.count()} processes"
        )
    loop = _Loop(
        method, config, Checkpoints(out, stage, identity), run.parallel if run else ParallelConfig(), ema_decay
    )
    latest, contributed = loop.latest, loop.contributed
    with loop, stage_log(out, stage, loop.step, loop.device, run) as log, deferred() as wishes:
        while loop.step < method.total:
            phase = method.phase(loop.step)
            try:
                with span(phase):
                    done = loop.take_step(draw, seed, wishes)
            except ValueError as error:  # ops look at what they are given: here, what diverged weights made
                raise DDFastError(
                    f"{stage}: step {loop.step} stopped: {error}; the last checkpoint is kept: "
                    "if the training diverged, try a lower learning rate"
                ) from error
            if isinstance(done, KeyboardInterrupt):
                loop.save()
                raise done
            loss, norm, logged = done
            figures: dict[str, Tensor | float] = {
                "loss": loss,
                "gradient_norm": norm,
                "learning_rate": loop.learning_rate,
            }
            latest |= {_named(what, phase, method): value for what, value in figures.items()}
            contributed |= logged
            if watch_every and (loop.step % watch_every == 0 or loop.step == method.total):
                seen, alarm = processes.first_said(method.watch(loop.step, loop.average))
                latest |= seen
                if alarm and not loop.alarmed:
                    loop.alarmed = True
                    if not checkpoints.keep(out, out / ALARM_CHECKPOINT):
                        loop.save(to=out / ALARM_CHECKPOINT)
                    warn(f"{stage}, step {loop.step}: {alarm}; {out / ALARM_CHECKPOINT} is kept")
            log.step(config.batch_size)
            if loop.step % config.log_every == 0 or loop.step == method.total:
                log.figures(loop.step, loop.figures())
                latest.clear()
                contributed.clear()
            if progress:
                progress(loop.step, method.total, log.text(f"loss {loss:.3f}"))
            if loop.step % config.checkpoint_every == 0 or loop.step == method.total:
                loop.save()
    return loop.average


def from_store(trajectories: Trajectories, teacher: Teacher) -> Draw:
    """Batches of a store's pairs."""
    device = teacher.codebook.device

    def draw(part: Part, codes: bool = True) -> Batch:
        rows = part.integers(len(trajectories.codes))
        return Batch(
            noise=trajectories.noise(rows).to(device),
            codes=trajectories.codes[rows].long().to(device),
            condition=teacher.condition_of(trajectories.condition[rows].to(device)),
        )

    return draw


def from_noise(teacher: Teacher, *, decoding: SamplingDefaults | None = None) -> Draw:
    """Batches of fresh noise and conditions; with settings for `decoding`, the teacher makes sequences beside them."""
    device = teacher.codebook.device

    def draw(part: Part, codes: bool = True) -> Batch:
        condition = teacher.condition_of(part.integers(teacher.num_conditions).to(device))
        seed = part.shared_seed()
        eps = part.noise(seed, (teacher.num_tokens, teacher.code_dim), device)
        drawn = None
        if decoding is not None and codes:
            own = seeds.generator(seed % 2**32, device)
            shape = (part.size, teacher.num_tokens)
            uniform = part.own(torch.rand(shape, generator=own, dtype=torch.float32, device=device))
            # No graph: it would keep the teacher's cache through the student's backward pass.
            drawn = teacher.generate(condition, uniform=uniform, graph=False, **dataclasses.asdict(decoding))
        return Batch(noise=eps, condition=condition, codes=drawn)

    return draw


def pairs_or_noise(trajectories: Trajectories | None, teacher: Teacher) -> Draw:
    """Batches of a store's pairs where codes are read, else of fresh noise; None: they never are."""
    noise = from_noise(teacher)
    pairs = noise if trajectories is None else from_store(trajectories, teacher)

    def draw(part: Part, codes: bool = True) -> Batch:
        return (pairs if codes else noise)(part, codes)

    return draw


class _Loop:
    """Everything a resumed run must find again, and one step of it; on leaving, the teacher is whole again."""

    def __init__(
        self, method: Method, config: OptimisationConfig, kept: Checkpoints, parallel: ParallelConfig, ema_decay: float
    ) -> None:
        self.method, self.config, self.checkpoints, self.parallel = method, config, kept, parallel
        self.device = method.roles.teacher.codebook.device
        # A network has its own optimizers, whichever phases update it.
        self.roles = {id(network): name for name, network in method.networks.items()}
        self.networks = {name: method.networks[name] for name in self.roles.values()}
        self.averaged = method.roles.student
        self.step = 0
        self.updates = dict.fromkeys(self.networks, 0)
        self.learning_rate = 0.0
        self.micro_batches: dict[str, MicroBatch] = {}
        self.latest: dict[str, Tensor | float] = {}
        self.contributed: dict[str, Tensor] = {}
        self.alarmed = False
        found = kept.newest()
        self.layout = self._layout(found[1].get("layout") if found else None)
        self.spread = Spread(
            self.networks.values(),
            method.roles.teacher,
            strategy=self.layout["strategy"],
            teacher_too=self.layout["teacher_too"],
        )
        method.call = self.spread
        dtype = getattr(torch, config.precision)
        self.optimizers = {
            name: optimizers(network, config.optimizer, weight_decay=config.weight_decay, dtype=dtype)
            for name, network in self.networks.items()
        }
        self.owners = {
            parameter: optimizer
            for optimizers in self.optimizers.values()
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self.average = ExponentialMovingAverage(self.averaged, ema_decay)
        if found:
            self._restore(*found)

    def __enter__(self) -> _Loop:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.spread.restore()

    def _layout(self, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """How the networks lie on the processes, and by which wish: as before, where that is the same."""
        node, memory = processes.per_node(), min(processes.gather(_memory(self.device)))
        asked = {"processes": processes.count(), "per_node": node, **dataclasses.asdict(self.parallel)}
        del asked["timeout"]
        if self.device.type == "cuda":  # on a smaller one, what fitted does not
            asked["gib"] = round(memory / 2**30)
        if before is not None and before.get("asked") == asked:
            self.micro_batches = {phase: MicroBatch(**kept) for phase, kept in before["micro_batches"].items()}
            return {**before}
        sizes = {name: Size.of(network) for name, network in self.networks.items()}
        state = sum(
            state_bytes(size, self.config.optimizer, averaged=self.networks[name] is self.averaged).total
            for name, size in sizes.items()
        )
        teacher = sum(parameter.nbytes for parameter in self.method.roles.teacher.parameters())
        memory = int(USABLE * memory)
        strategy = self.parallel.strategy
        if strategy == "auto":
            strategy = choose_strategy(state + teacher, memory, node)
        shares = strategy == "shard" and shards_teacher(part_of(state, node), teacher, memory)
        return {"asked": asked, "strategy": strategy, "teacher_too": shares}

    def take_step(
        self, draw: Draw, seed: int, wishes: Wishes
    ) -> tuple[float, Tensor, dict[str, Tensor]] | KeyboardInterrupt:
        """One optimizer step; or, where a signal has come to any process, what to raise: nothing has changed then.

        Returns:
            the batch's loss, its gradient's norm before clipping, and what this process contributes to the log.

        Raises:
            DDFastError: the loss is not finite.
        """
        method, phase = self.method, self.method.phase(self.step)
        network = method.networks[phase]
        logged: dict[str, Tensor] = {}
        own = torch.zeros((), dtype=torch.float64, device=self.device)
        micro_batch = self.micro_batches.get(phase) or self._micro_batch(phase, draw)
        parts = list(self._parts(_step_seed(seed, self.step), micro_batch.size))
        for number, part in enumerate(parts):
            processes.sign()
            answer = _agreed(wishes)
            if answer:
                return answer
            if number == 0 and method.starts_from_average(self.step):
                self.average.copy_to(self.averaged)
            self.spread.accumulate(last=number == len(parts) - 1)
            with fitting(len(part), self.device, "--parallel.micro-batch"):
                contribution, figures = self._contribution(phase, draw, part, micro_batch.recompute)
                if number == 0:
                    # Not before: while the last step's gradients stand at the heap's end, what the pass needs below
                    # them does not go back to the system, to be asked for again (a twentieth of a step on a CPU).
                    network.zero_grad(set_to_none=True)
                with span("backward"):
                    contribution.backward()
            own += contribution.detach()
            logged = {name: logged[name] + value if logged else value for name, value in figures.items()}
        loss = float(processes.total(own.cpu()))
        if not math.isfinite(loss):
            raise DDFastError(
                f"{self.checkpoints.stage}: the loss became {loss} at step {self.step}; the last checkpoint is kept: "
                "try a lower learning rate"
            )
        with span("optimizer"):
            norm = self._update(phase)
        if len(self.networks) > 1:  # the other networks' turns need the memory
            network.zero_grad(set_to_none=True)
        return loss, norm, logged

    def _micro_batch(self, phase: str, draw: Draw) -> MicroBatch:
        """What a phase's micro-batch is from its first step on: as asked for, or as memory holds."""
        size = self.config.batch_size

        def attempt(samples: int, recompute: bool) -> None:
            part = Part(size=size, first=0, last=samples, generator=seeds.generator(0))
            try:
                self._contribution(phase, draw, part, recompute)[0].backward()
            finally:
                self.method.networks[phase].zero_grad(set_to_none=True)

        optimizers = [optimizer for optimizers in self.optimizers.values() for optimizer in optimizers]
        self.micro_batches[phase] = choose(
            attempt,
            -(-size // processes.count()),
            self.device,
            size=self.parallel.micro_batch,
            recompute=self.parallel.recompute,
            reserved=missing_bytes(self.networks.values(), optimizers),
        )
        return self.micro_batches[phase]

    def _parts(self, seed: int, micro_batch: int) -> Iterator[Part]:
        """This process's part of the batch, in as many micro-batches as every process has."""
        size, count, rank = self.config.batch_size, processes.count(), processes.rank()
        first, last = size * rank // count, size * (rank + 1) // count
        largest, smallest = -(-size // count), size // count
        number = min(-(-largest // micro_batch), smallest)
        for part in range(number):
            begin, end = (first + (last - first) * border // number for border in (part, part + 1))
            yield Part(size=size, first=begin, last=end, generator=seeds.generator(seed))

    def _contribution(self, phase: str, draw: Draw, part: Part, recompute: bool) -> tuple[Tensor, dict[str, Tensor]]:
        method, reads = self.method, self.method.reads_codes(phase)
        with span("draw"):
            batch = self.spread(draw, part, reads) if self.spread.spreads_teacher else draw(part, reads)
        # A cast that is kept would keep a block's weights, which are gathered for a moment.
        reduced, kept = self.config.precision == "bfloat16", processes.count() == 1
        with contextlib.ExitStack() as around:
            around.enter_context(span("forward"))
            around.enter_context(torch.autocast(self.device.type, torch.bfloat16, enabled=reduced, cache_enabled=kept))
            for network in self.networks.values() if recompute else ():
                around.enter_context(recomputing(network))
            return self.spread(method.step, phase, batch, part)

    def _update(self, phase: str) -> Tensor:
        """The optimizer's step, and the average's move if it was the student's; the gradient's norm before clipping."""
        network = self.method.networks[phase]
        name = self.roles[id(network)]
        self.learning_rate = self.method.learning_rate(phase, self.updates[name])
        norm = nn.utils.clip_grad_norm_(network.parameters(), self.config.gradient_clip)
        for optimizer in self.optimizers[name]:
            step_at(optimizer, self.learning_rate)
        if network is self.averaged:
            self.average.update(network, self.updates[name])
        self.updates[name] += 1
        self.step += 1
        return processes.whole(norm)

    def figures(self) -> dict[str, float]:
        """The latest of every figure since the log's last line, of the whole batch; all processes ask."""
        return {name: _number(value) for name, value in self.latest.items()} | _sums(self.contributed)

    def save(self, *, to: Path | None = None) -> None:
        """Write a checkpoint; all processes do, at the same step."""
        micro_batches = {phase: dataclasses.asdict(found) for phase, found in self.micro_batches.items()}
        layout = {**self.layout, "micro_batches": micro_batches}
        state = {"step": self.step, "updates": self.updates, "layout": layout}
        state |= {"figures": self.figures(), "alarmed": self.alarmed}
        self.checkpoints.save(self._tensors(), state, to=to)

    def _restore(self, place: Path, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.step, self.updates = state["step"], dict(state["updates"])
        self.latest, self.alarmed = dict(state["figures"]), state["alarmed"]
        self._make_states(checkpoints.names_in(place))
        checkpoints.load(place, self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        """Networks, average, and what the optimizers keep of every parameter."""
        tensors = {f"average.{name}": value for name, value in self.average.average.items()}
        for role, network in self.networks.items():
            for name, parameter in network.named_parameters():
                tensors[f"{role}.{name}"] = parameter.detach()
                for moment, value in self.owners[parameter].state.get(parameter, {}).items():
                    tensors[f"{moment}.{role}.{name}"] = value
        return tensors

    def _make_states(self, names: set[str]) -> None:
        """Make what the optimizers have of parameters in a checkpoint; one that no loss reached yet has nothing."""
        for role, network in self.networks.items():
            for name, parameter in network.named_parameters():
                kept = [moment for moment in _MOMENTS if f"{moment}.{role}.{name}" in names]
                for moment in kept:
                    empty = torch.zeros((), dtype=torch.float32) if moment == "step" else torch.zeros_like(parameter)
                    self.owners[parameter].state[parameter][moment] = empty.detach()


_MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""What AdamW and Muon keep of a parameter."""


def _memory(device: torch.device) -> int:
    """Bytes that a process has: those of its GPU, or of the machine's own memory its share of what is free."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return free_bytes(device)


def _agreed(wishes: Wishes) -> KeyboardInterrupt | None:
    """What Ctrl-C or SIGTERM asked of any process, for all to raise."""
    if processes.count() > 1:
        came = torch.tensor([wishes.interrupted, wishes.terminated], dtype=torch.float64)
        wishes.interrupted, wishes.terminated = (bool(number) for number in processes.total(came))
    return wishes.answer()


def _sums(contributed: dict[str, Tensor]) -> dict[str, float]:
    """Sums over the processes of what each contributed to the figures of a batch."""
    if not contributed:
        return {}
    own = torch.stack([value.detach().double() for value in contributed.values()]).cpu()
    return dict(zip(contributed, processes.total(own).tolist(), strict=True))


def _named(what: str, phase: str, method: Method) -> str:
    """The log's name for a figure of one phase; the phase is left out where there is no other."""
    return what if len(method.networks) == 1 else f"{phase}_{what}"


def _number(value: Tensor | float) -> float:
    return value.item() if isinstance(value, Tensor) else value


def _step_seed(seed: int, step: int) -> int:
    return (seeds.folded(seed) * 1_000_003 + step) % 2**32

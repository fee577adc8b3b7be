"""The training loop of every distillation stage: optimizers, moving average, log, alarms and exact resume."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from ddfast import seeds
from ddfast.config import OptimisationConfig
from ddfast.distill.batch import Batch, Draw, Part
from ddfast.distill.method import ExponentialMovingAverage, Method
from ddfast.errors import DDFastError
from ddfast.files import write_atomically
from ddfast.messages import warn
from ddfast.models.autoregressive import SamplingDefaults
from ddfast.models.checkpoint import load_tensors, save_tensors
from ddfast.models.layers import stacked_rows
from ddfast.models.official import UNFINISHED
from ddfast.models.protocol import Teacher
from ddfast.progress import Progress
from ddfast.trajectories.store import Trajectories

CHECKPOINT = UNFINISHED
ALARM_CHECKPOINT = "checkpoint-before-alarm.safetensors"
METRICS = "metrics.jsonl"

_MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""What AdamW and Muon keep of a parameter."""


def optimise(
    method: Method,
    config: OptimisationConfig,
    draw: Draw,
    out: Path,
    *,
    stage: str,
    seed: int,
    identity: str,
    ema_decay: float = 0.0,
    watch_every: int = 0,
    progress: Progress | None = None,
) -> ExponentialMovingAverage:
    """Run a stage; returns the moving average of the student (with `ema_decay` 0: its weights as they are).

    Every `checkpoint_every` steps, and when interrupted, the whole state goes to `out/checkpoint.safetensors`; a later
    call with the same settings continues from there and ends with the same weights, bit for bit on a CPU. Step k's
    batch and randomness depend on (seed, k) alone. `out/metrics.jsonl` gets a line every `log_every` steps.

    Args:
        method: its networks are trained in place.
        config: optimizer, batches, log and checkpoints.
        draw: makes the batches.
        out: folder of the run.
        stage: its name, in the log and in the checkpoint.
        seed: of every step's randomness.
        identity: of the settings; a checkpoint of others is refused.
        ema_decay: of the student's moving average.
        watch_every: steps between the method's looks at its samples; 0: none. What it finds alarming is printed, and
            the last checkpoint before it is kept as `checkpoint-before-alarm.safetensors`.
        progress: called as progress(done, total, text).

    Raises:
        DDFastError: the checkpoint is of other settings, or the loss is no longer finite.
    """
    run = _Run(method, config, stage, identity, ema_decay)
    run.restore(out / CHECKPOINT)
    _truncate_metrics(out / METRICS, stage, run.step)
    started, first_step, alarmed = time.perf_counter(), run.step, False
    device = method.roles.teacher.codebook.device
    reduced = config.precision == "bfloat16"
    latest: dict[str, Tensor | float] = {}
    try:
        while run.step < method.total:
            generator = seeds.generator(_step_seed(seed, run.step))
            if method.starts_from_average(run.step):
                run.average.copy_to(run.averaged)
            phase = method.phase(run.step)
            part = Part.whole(config.batch_size, generator)
            batch = draw(part, method.reads_codes(phase))
            try:
                with torch.autocast(device.type, torch.bfloat16, enabled=reduced):
                    loss, logged = method.step(phase, batch, part)
            except ValueError as error:  # ops look at what they are given: here, what diverged weights made
                raise DDFastError(
                    f"{stage}: step {run.step} stopped: {error}; the last checkpoint is kept: "
                    "if the training diverged, try a lower learning rate"
                ) from error
            if not math.isfinite(loss.item()):
                raise DDFastError(
                    f"{stage}: the loss became {loss.item()} at step {run.step}; the last checkpoint is kept: "
                    "try a lower learning rate"
                )
            norm = run.update(phase, loss)
            figures: dict[str, Tensor | float] = {
                "loss": loss.detach(),
                "gradient_norm": norm,
                "learning_rate": run.learning_rate,
            }
            latest |= {_named(what, phase, method): value for what, value in figures.items()}
            latest |= logged
            if watch_every and (run.step % watch_every == 0 or run.step == method.total):
                seen, alarm = method.watch(run.step, run.average)
                latest |= seen
                if alarm and not alarmed:
                    alarmed = True
                    kept = run.keep(out / CHECKPOINT, out / ALARM_CHECKPOINT)
                    warn(f"{stage}, step {run.step}: {alarm}; {kept} is kept")
            if run.step % config.log_every == 0 or run.step == method.total:
                rate = (run.step - first_step) / (time.perf_counter() - started)
                line = {"stage": stage, "step": run.step, **{name: _number(value) for name, value in latest.items()}}
                with (out / METRICS).open("a") as file:
                    file.write(json.dumps(line | {"steps_per_second": round(rate, 2)}) + "\n")
                latest = {}
            if progress:
                progress(run.step, method.total, f"loss {loss.item():.3f}")
            if run.step % config.checkpoint_every == 0 or run.step == method.total:
                run.save(out / CHECKPOINT)
    except KeyboardInterrupt:
        run.save(out / CHECKPOINT)
        raise
    return run.average


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


class _Run:
    """Everything a resumed run must find again."""

    def __init__(self, method: Method, config: OptimisationConfig, stage: str, identity: str, ema_decay: float) -> None:
        self.method, self.config, self.stage, self.identity = method, config, stage, identity
        # A network has its own optimizers, whichever phases update it.
        self.roles = {id(network): name for name, network in method.networks.items()}
        self.networks = {name: method.networks[name] for name in self.roles.values()}
        self.optimizers = {name: _optimizers(network, config) for name, network in self.networks.items()}
        self.owners = {
            parameter: optimizer
            for optimizers in self.optimizers.values()
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self.averaged = method.roles.student
        self.average = ExponentialMovingAverage(self.averaged, ema_decay)
        self.step = 0
        self.updates = dict.fromkeys(self.networks, 0)
        self.learning_rate = 0.0

    def update(self, phase: str, loss: Tensor) -> Tensor:
        """One optimizer step, and the average's move if it was the student's; the gradient's norm before clipping."""
        network = self.method.networks[phase]
        name = self.roles[id(network)]
        self.learning_rate = self.method.learning_rate(phase, self.updates[name])
        network.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), self.config.gradient_clip)
        for optimizer in self.optimizers[name]:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate
            optimizer.step()
        if network is self.averaged:
            self.average.update(network, self.updates[name])
        self.updates[name] += 1
        self.step += 1
        return norm

    def save(self, path: Path) -> None:
        """Write the state; the old file stays until the new one is complete."""
        tensors: dict[str, Tensor] = {f"average.{name}": value for name, value in self.average.average.items()}
        for role, network in self.networks.items():
            for name, parameter in network.named_parameters():
                tensors[f"{role}.{name}"] = parameter
                for moment, value in self.owners[parameter].state.get(parameter, {}).items():
                    tensors[f"{moment}.{role}.{name}"] = value
        header = {"stage": self.stage, "identity": self.identity, "step": self.step, "updates": self.updates}
        save_tensors(path, tensors, header)

    def keep(self, path: Path, copy: Path) -> Path:
        """Keep the last checkpoint (none yet: the state of now) under another name."""
        if path.exists():
            shutil.copyfile(path, copy)
        else:
            self.save(copy)
        return copy

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Continue from `path` if it exists and is of this stage."""
        if not path.exists():
            return
        tensors, header = load_tensors(path)
        if header.get("stage") != self.stage:  # of an earlier stage, whose result is there: interrupted in between
            return
        if header.get("identity") != self.identity:
            raise DDFastError(f"{path} belongs to a run with other settings; choose another --out or delete the file")
        self.step, self.updates = header["step"], header["updates"]
        for role, network in self.networks.items():
            for place in (f"{role}.", *(f"{moment}.{role}." for moment in _MOMENTS)):
                _stack(tensors, place, network)
        _stack(tensors, "average.", self.averaged)
        for role, network in self.networks.items():
            for name, parameter in network.named_parameters():
                parameter.copy_(tensors[f"{role}.{name}"])
                moments = {
                    moment: tensors[f"{moment}.{role}.{name}"].to("cpu" if moment == "step" else parameter.device)
                    for moment in _MOMENTS
                    if f"{moment}.{role}.{name}" in tensors
                }
                if moments:  # a parameter that no loss reached yet has none
                    self.owners[parameter].state[parameter] = moments
        for name, value in self.average.average.items():
            value.copy_(tensors[f"average.{name}"])


def _stack(tensors: dict[str, Tensor], place: str, network: nn.Module) -> None:
    """Put together what a checkpoint of before has of the parts of a matrix; a count of steps is that of each."""
    for whole, parts in stacked_rows(network):
        found = [tensors[place + part] for part in parts if place + part in tensors]
        if len(found) == len(parts):
            tensors[place + whole] = torch.cat(found) if found[0].dim() else found[0]


def _optimizers(network: nn.Module, config: OptimisationConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and where it is asked for Muon (Jordan et al. 2024), scaled so that one learning rate suits both."""
    matrices: list[Tensor] = []
    if config.optimizer == "muon":
        linear = (module for module in network.modules() if isinstance(module, nn.Linear))
        matrices = list(dict.fromkeys(module.weight for module in linear))
    taken = set(matrices)
    rest = [parameter for parameter in network.parameters() if parameter not in taken]
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, weight_decay=config.weight_decay, betas=(0.9, 0.95))]
    if matrices:
        made.append(torch.optim.Muon(matrices, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return made


def _named(what: str, phase: str, method: Method) -> str:
    """The log's name for a figure of one phase; the phase is left out where there is no other."""
    return what if len(method.networks) == 1 else f"{phase}_{what}"


def _number(value: Tensor | float) -> float:
    return value.item() if isinstance(value, Tensor) else value


def _step_seed(seed: int, step: int) -> int:
    return (seeds.folded(seed) * 1_000_003 + step) % 2**32


def _truncate_metrics(path: Path, stage: str, step: int) -> None:
    """Drop log lines of steps that will be run again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if line.get("stage") != stage or line["step"] <= step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))

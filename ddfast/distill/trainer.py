"""The training loop of distillation: optimizer, schedule, moving average, log and exact resume."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from ddfast.config import TrainConfig, config_hash
from ddfast.distill.dd1 import DD1
from ddfast.distill.method import Batch, ExponentialMovingAverage, Roles
from ddfast.errors import DDFastError
from ddfast.models.checkpoint import load_tensors, save_tensors
from ddfast.models.digits import Progress
from ddfast.models.loading import start_student
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.schedule import warmup_cosine
from ddfast.trajectories.store import Trajectories

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"


def distill(
    config: TrainConfig,
    teacher: Teacher,
    trajectories: Trajectories,
    out: Path,
    *,
    student: Student | None = None,
    progress: Progress | None = None,
) -> tuple[Student, dict[str, Tensor]]:
    """Train a DD1 student (None: one that starts as the teacher); returns it averaged, and the live weights.

    Every `checkpoint_every` steps, and when interrupted, the whole state goes to `out/checkpoint.safetensors`; a later
    call with the same settings continues from there and ends with the same weights, bit for bit on a CPU. Step k's
    batch and randomness depend on (seed, k) alone. `out/metrics.jsonl` gets a line every `log_every` steps.

    Raises:
        DDFastError: the checkpoint is of other settings, or the loss is no longer finite.
    """
    torch.manual_seed(config.seed)
    if student is None:
        student = start_student(teacher)
    if config.dd1.split >= 0:
        student.split = config.dd1.split
    student = student.to(config.device, torch.float32).train().requires_grad_(True)
    method = DD1(Roles(student=student, teacher=teacher), config.dd1)
    run = _Run(student, config)
    run.restore(out / CHECKPOINT)
    _truncate_metrics(out / METRICS, run.step)
    started, first_step = time.perf_counter(), run.step
    total, reduced = config.dd1.iterations, config.dd1.precision == "bfloat16"
    try:
        while run.step < total:
            generator = torch.Generator().manual_seed(_step_seed(config.seed, run.step))
            batch = _draw(trajectories, teacher, config.dd1.batch_size, generator, config.device)
            with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=reduced):
                loss, logged = method.step(method.phase(run.step), batch, generator)
            if not math.isfinite(loss.item()):
                raise DDFastError(
                    f"the loss became {loss.item()} at step {run.step}; the last checkpoint is kept: "
                    "try a lower dd1.learning_rate"
                )
            gradient_norm = run.update(loss)
            if run.step % config.dd1.log_every == 0 or run.step == total:
                rate = (run.step - first_step) / (time.perf_counter() - started)
                line = {"step": run.step, "loss": loss.item(), **logged, "gradient_norm": gradient_norm}
                line |= {"learning_rate": run.learning_rate, "steps_per_second": round(rate, 2)}
                with (out / METRICS).open("a") as file:
                    file.write(json.dumps(line) + "\n")
            if progress:
                progress(run.step, total, f"loss {loss.item():.3f}")
            if run.step % config.dd1.checkpoint_every == 0 or run.step == total:
                run.save(out / CHECKPOINT)
    except KeyboardInterrupt:
        run.save(out / CHECKPOINT)
        raise
    live = {name: value.detach().clone() for name, value in student.state_dict().items()}
    run.average.copy_to(student)
    return student.eval().requires_grad_(False), live


class _Run:
    """Everything a resumed run must find again."""

    def __init__(self, student: Student, config: TrainConfig) -> None:
        self.student, self.config = student, config.dd1
        self.optimizer = torch.optim.AdamW(
            student.parameters(), lr=config.dd1.learning_rate, weight_decay=config.dd1.weight_decay, betas=(0.9, 0.95)
        )
        self.average = ExponentialMovingAverage(student, config.dd1.ema_decay)
        self.identity = config_hash(config.dd1, config.trajectories, config.teacher, config.tokenizer, config.seed)
        self.step = 0
        self.learning_rate = 0.0

    def update(self, loss: Tensor) -> float:
        """One optimizer step and the average's move after it; returns the gradient's norm before clipping."""
        factor = warmup_cosine(self.step, total=self.config.iterations, warmup=self.config.warmup)
        self.learning_rate = self.config.learning_rate * factor
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        self.average.update(self.student, self.step)
        self.step += 1
        return norm.item()

    def save(self, path: Path) -> None:
        """Write the state; the old file stays until the new one is complete."""
        tensors: dict[str, Tensor] = {f"student.{name}": value for name, value in self.student.named_parameters()}
        tensors |= {f"average.{name}": value for name, value in self.average.average.items()}
        for name, parameter in self.student.named_parameters():
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{moment}.{name}"] = value
        save_tensors(path, tensors, {"identity": self.identity, "step": self.step})

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Continue from `path` if it exists."""
        if not path.exists():
            return
        tensors, header = load_tensors(path)
        if header.get("identity") != self.identity:
            raise DDFastError(f"{path} belongs to a run with other settings; choose another --out or delete the file")
        self.step = header["step"]
        for name, parameter in self.student.named_parameters():
            parameter.copy_(tensors[f"student.{name}"])
            self.average.average[name].copy_(tensors[f"average.{name}"])
            self.optimizer.state[parameter] = {
                moment: tensors[f"{moment}.{name}"].to("cpu" if moment == "step" else parameter.device)
                for moment in ("step", "exp_avg", "exp_avg_sq")
            }


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**63


def _draw(trajectories: Trajectories, teacher: Teacher, size: int, generator: torch.Generator, device: str) -> Batch:
    rows = torch.randint(len(trajectories.codes), (size,), generator=generator)
    return Batch(
        noise=trajectories.noise(rows).to(device),
        codes=trajectories.codes[rows].long().to(device),
        condition=teacher.condition_of(trajectories.condition[rows].to(device)),
    )


def _truncate_metrics(path: Path, step: int) -> None:
    """Drop log lines of steps that will be run again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        complete = [line for line in path.read_text().splitlines() if line.endswith("}")]
        path.write_text("".join(line + "\n" for line in complete if json.loads(line)["step"] <= step))

"""DD2: a one-step generator that has the teacher's conditional score at every token (docs/dd2.md).

Method: docs/method.md section 12 (DD2: the score distance); ours: docs/method.md section 13 (DD2: what ddfast adds).

Three stages, each a `Method`: `Adaptation` (LlamaGen's input), `Tuning` (AR-diffusion), `Matching` (the distillation).
Dimensions: m noise draws, B batch, N tokens, V codes, D code dimension.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast import seeds
from ddfast.config import AdaptConfig, MatchConfig, TuneConfig
from ddfast.distill.batch import Batch, Part
from ddfast.distill.losses import (
    anchor_distance,
    next_token_divergence,
    score_distance_kl,
    score_distance_sid,
    velocity_distance,
)
from ddfast.distill.method import ExponentialMovingAverage, Method, Roles, scheduled_rate
from ddfast.distill.monitor import Watcher
from ddfast.models.autoregressive import Condition, SamplingDefaults
from ddfast.models.flow_network import FlowNetwork
from ddfast.models.protocol import Teacher
from ddfast.ops import codebook_posterior, flow_sample, nearest_code, velocity
from ddfast.ops.forms import add_noise
from ddfast.ops.geometry import codebook_geometry

_FIRST_TIME, _LAST_TIME = 0.02, 0.98
"""Flow times of the score distance: closer to the data both scores blow up, at t=1 they know nothing of the token."""

_TIME_BINS = 4

_ANCHOR_WIDTH = 0.5
"""Of the anchor's distance, in units of a typical code's distance to its nearest neighbour."""


class Adaptation(Method):
    """Stage 0: the MLP that stands in for the token table learns the table, then the whole model its likelihood.

    Args:
        roles: the student is the network to adapt.
        config: iterations.
        held_out: samples of the teacher to follow the likelihood on.
    """

    def __init__(self, roles: Roles, config: AdaptConfig, held_out: Batch | None = None) -> None:
        super().__init__(roles)
        if not isinstance(roles.student, FlowNetwork) or not roles.student.looks_up:
            raise TypeError(f"student: got {type(roles.student).__name__}, expected a network that looks tokens up")
        self.student, self.config, self.held_out = roles.student, config, held_out
        self.networks = {"fit": roles.student, "tune": roles.student}
        self.total = config.iterations

    def phase(self, step: int) -> str:
        """The table first."""
        return "fit" if step < self.config.fit_iterations else "tune"

    def learning_rate(self, phase: str, update: int) -> float:
        """One schedule over both."""
        return scheduled_rate(self.config, update, self.total)

    def step(self, phase: str, batch: Batch, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """Distance to the table, or next-token cross-entropy on the teacher's samples."""
        if phase == "fit":
            return part.share * self.student.embedding_error(), {}
        assert batch.codes is not None
        return part.share * negative_log_likelihood(self.student, batch.condition, batch.codes), {}

    def reads_codes(self, phase: str) -> bool:
        """The table is there without a sample."""
        return phase == "tune"

    def watch(self, step: int, average: ExponentialMovingAverage) -> tuple[dict[str, float], str | None]:
        """Nats per token on the held-out samples."""
        if self.held_out is None or self.held_out.codes is None:
            return {}, None
        found = self.call(code_likelihoods, self.student, self.held_out.condition, self.held_out.codes)
        return {f"{name}_nll": value for name, value in found.items()}, None


def negative_log_likelihood(network: FlowNetwork, condition: Condition, codes: Tensor) -> Tensor:
    """Mean next-token cross-entropy, in nats, of a network's own code head on codes int64 [B, N], unguided."""
    logits = network.code_logits(network.features(condition, network.codebook[codes]))
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def code_likelihoods(network: FlowNetwork, condition: Condition, codes: Tensor) -> dict[str, float]:
    """Nats per token on the teacher's samples: of the teacher itself, and of the network that adapted its input."""
    with torch.no_grad():
        logits = network.teacher.logits(condition, codes)
        return {
            "teacher": float(F.cross_entropy(logits.flatten(0, 1), codes.flatten())),
            "adapted": float(negative_log_likelihood(network, condition, codes)),
        }


class Tuning(Method):
    """Stage 1: regress the velocity of every next token's flow, on the teacher's sequences.

    With `loss="gts"` the target is the teacher's closed-form velocity (Ground Truth Score), else noise minus token.

    Args:
        roles: the student is the network to tune.
        config: iterations, draws, and whose distribution is the target.
    """

    def __init__(self, roles: Roles, config: TuneConfig) -> None:
        super().__init__(roles)
        assert isinstance(roles.student, FlowNetwork)
        self.student, self.config = roles.student, config
        self.networks = {"head": roles.student, "full": roles.student}
        self.total = config.iterations
        self.sampling = sampling_settings(roles.teacher, config)

    def phase(self, step: int) -> str:
        """The head first."""
        return "head" if step < self.config.head_iterations else "full"

    def learning_rate(self, phase: str, update: int) -> float:
        """One schedule over both."""
        return scheduled_rate(self.config, update, self.total)

    def step(self, phase: str, batch: Batch, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the velocity at noisy tokens."""
        assert batch.codes is not None
        student, teacher = self.student, self.roles.teacher
        tokens = student.codebook[batch.codes]
        with torch.set_grad_enabled(phase == "full"):
            features = student.features(batch.condition, tokens)
        t, eps, _ = _draws(self.config.draws, tokens, part, _FIRST_TIME, 1.0)
        x = add_noise(tokens, eps, t)
        with torch.no_grad():
            if self.config.loss == "gts":
                log_probs = teacher.log_probs(batch.condition, batch.codes, defaults=self.sampling)
                target = velocity(x, t, log_probs, student.codebook)
            else:
                target = eps - tokens
        return part.share * velocity_distance(student.velocity(x, t, features), target), {}


class Matching(Method):
    """Stage 2: the generator learns the teacher's conditional scores; a guidance network learns the generator's.

    The guidance network tells the generator's score of a token given those before it: by its velocity, learnt by flow
    matching, or by its distribution over codes, learnt by cross-entropy and turned into a score by the teacher's own
    closed form. A generated sequence enters the teacher and the guidance network as a stop-gradient prefix, so a
    generator's update moves every token given the ones before it. Beside the score distance, two terms need no
    guidance network: the *anchor* draws every token to the code that the teacher's flow, given the generator's own
    earlier tokens, takes that token's noise to; the *look-ahead* has the teacher's head read the next-token
    distribution off the generator's features. Of a generator that recycles, every run learns these two, with the last
    one's targets, and the last one the score distance. Phases: "start" (those two alone), "guidance", "student".

    Args:
        roles: generator, guidance network and teacher.
        config: form, weights, schedule.
    """

    def __init__(self, roles: Roles, config: MatchConfig) -> None:
        super().__init__(roles)
        assert isinstance(roles.student, FlowNetwork)
        if config.score_weight and roles.guidance is None:
            raise ValueError("guidance: got None, expected a guidance network for the score distance")
        self.student, self.config = roles.student, config
        self.networks: dict[str, nn.Module] = {"start": roles.student, "student": roles.student}
        if roles.guidance is not None:
            self.networks["guidance"] = roles.guidance
        self.schedule = _schedule(config)
        self.total = sum(length for _, length, _ in self.schedule)
        self.student_updates = config.start_iterations + config.iterations + config.later_iterations
        self.start_updates = config.start_iterations if config.score_weight else self.student_updates
        self.guidance_updates = sum(
            length * updates // (updates + 1) if name == "alternate" else length
            for name, length, updates in self.schedule
            if name != "start"
        )
        self.sampling = sampling_settings(roles.teacher, config)
        self.watcher = Watcher(roles.student, roles.teacher)
        self.anchor_width = _ANCHOR_WIDTH * float(codebook_geometry(roles.student.codebook).nearest.median())

    def phase(self, step: int) -> str:
        """Whose turn it is: in an alternating part, K updates of the guidance network, then one of the generator."""
        for name, length, updates in self.schedule:
            if step < length:
                if name != "alternate":
                    return name
                return "guidance" if step % (updates + 1) < updates else "student"
            step -= length
        raise ValueError(f"step: got one past the end, expected less than {self.total}")

    def learning_rate(self, phase: str, update: int) -> float:
        """Every phase has its own peak and count of updates."""
        config, total = self.config, self.student_updates
        if phase == "guidance":
            rate, warmup = config.guidance_learning_rate, config.guidance_warmup
            config, total = dataclasses.replace(config, learning_rate=rate, warmup=warmup), self.guidance_updates
        elif phase == "start":
            config, total = dataclasses.replace(config, learning_rate=config.start_learning_rate), self.start_updates
        else:
            update, total = update - self.start_updates, total - self.start_updates
        return max(scheduled_rate(config, update, total), config.first_learning_rate if update < config.warmup else 0.0)

    def starts_from_average(self, step: int) -> bool:
        """Performance alignment: the averaged weights become the generator where that part of the schedule begins."""
        return self.config.align_iterations > 0 and step == self.total - sum(n for _, n, _ in self.schedule[-2:])

    def watch(self, step: int, average: ExponentialMovingAverage) -> tuple[dict[str, float], str | None]:
        """Likelihood and diversity of a fixed batch of samples, and how far the averaged weights' are from them."""
        return self.watcher.look(average, self.call)

    def step(self, phase: str, batch: Batch, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """One update of the guidance network or of the generator."""
        if phase == "guidance":
            return part.share * self._guidance_step(batch, part), {}
        config, student, teacher = self.config, self.student, self.roles.teacher
        runs = student.runs(batch.condition, batch.noise)
        x = runs[-1][0]
        prefix = self._prefix(x)
        with torch.no_grad():
            log_probs = teacher.log_probs(batch.condition, prefix, defaults=self.sampling)
        loss, logged = x.new_zeros(()), {}
        by_time: dict[str, Tensor] = {}
        if config.anchor_weight:
            with torch.no_grad():
                target = flow_sample(log_probs, batch.noise, student.codebook)[1]
            by_run = [anchor_distance(made, target, self.anchor_width) for made, _ in runs]
            logged["anchor"] = by_run[-1]
            loss = loss + config.anchor_weight * sum(by_run)
        if config.lookahead_weight:
            by_run = [next_token_divergence(student.code_logits(features), log_probs) for _, features in runs]
            logged["lookahead"] = by_run[-1]
            loss = loss + config.lookahead_weight * sum(by_run)
        if config.score_weight and phase == "student":
            distance, by_time = self._score_distance(x, prefix, log_probs, batch.condition, part)
            logged["score_distance"] = distance
            loss = loss + config.score_weight * distance
        return part.share * loss, {name: part.share * value.detach() for name, value in logged.items()} | by_time

    def _prefix(self, x: Tensor) -> Tensor:
        """What is read of generated tokens x [B, N, D], without gradient: int64 codes [B, N], or x as it is."""
        return nearest_code(x.detach(), self.student.codebook) if self.config.prefix == "codes" else x.detach()

    def _guidance_step(self, batch: Batch, part: Part) -> Tensor:
        """Cross-entropy of generated codes, or flow matching on generated tokens, given those before them."""
        guidance = self.roles.guidance
        assert guidance is not None
        with torch.no_grad():
            x, _ = self.student.generate(batch.condition, batch.noise)
            prefix = self._prefix(x)
            tokens = self.roles.teacher.embed(prefix)
        features = guidance.features(batch.condition, tokens)
        if self.config.fake_score == "codes":
            codes = prefix if self.config.prefix == "codes" else nearest_code(x, self.student.codebook)
            return F.cross_entropy(guidance.code_logits(features).flatten(0, 1), codes.flatten())
        t, eps, _ = _draws(self.config.draws, x, part, _FIRST_TIME, 1.0)
        return velocity_distance(guidance.velocity(add_noise(x, eps, t), t, features), eps - x)

    def _score_distance(
        self, x: Tensor, prefix: Tensor, log_probs: Tensor, condition: Condition, part: Part
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """CSD at a part's tokens x [b, N, D], and what it contributes to the predictions' difference by flow time."""
        guidance, config = self.roles.guidance, self.config
        assert guidance is not None
        t, eps, all_times = _draws(config.draws, x, part, _FIRST_TIME, _LAST_TIME)
        with _frozen(guidance):
            with torch.no_grad():
                features = guidance.features(condition, self.roles.teacher.embed(prefix))
            with torch.set_grad_enabled(config.form == "sid"):
                noisy = add_noise(x, eps, t)
                real = codebook_posterior(noisy, t, log_probs, self.student.codebook)
                if config.fake_score == "codes":
                    fake_log_probs = guidance.code_logits(features).float().log_softmax(-1)
                    fake = codebook_posterior(noisy, t, fake_log_probs, self.student.codebook)
                else:
                    fake = guidance.x0(noisy, t, features)
        if config.form == "kl":
            distance = score_distance_kl(x, real, fake)
        else:
            distance = score_distance_sid(x, real, fake, config.alpha)
        return distance, _by_time((real - fake).detach().square().sum(-1), t, all_times)


def sampling_settings(teacher: Teacher, config: TuneConfig | MatchConfig) -> SamplingDefaults:
    """The teacher's own sampling settings, with what the configuration changes of them."""
    changed = config.sampling()
    return dataclasses.replace(teacher.defaults, **changed)


def _schedule(config: MatchConfig) -> list[tuple[str, int, int]]:
    """Parts of stage 2: (phase, or "alternate"; steps; K)."""
    if not config.score_weight:  # no guidance network: the same number of the generator's updates
        return [("start", config.start_iterations + config.iterations + config.later_iterations, 0)]
    updates, later = config.guidance_updates, config.later_guidance_updates
    return [
        ("start", config.start_iterations, 0),
        ("guidance", config.guidance_first, 0),
        ("alternate", config.iterations * (updates + 1), updates),
        ("guidance", config.align_iterations, 0),
        ("alternate", config.later_iterations * (later + 1), later),
    ]


def _draws(draws: int, x: Tensor, part: Part, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """Flow times [m, b, N], uniform between the bounds, and noise [m, b, N, D] for a part's tokens x [b, N, D].

    The third is the times of the whole batch [m, B, N].
    """
    seed = part.shared_seed()
    own = seeds.generator(seed % 2**32, x.device)  # drawn where it is used: millions of numbers a step
    shape = (draws, part.size, x.shape[1])
    t = low + (high - low) * torch.rand(shape, generator=own, dtype=torch.float32, device=x.device)
    return part.own(t, 1), part.noise(seed, (draws, *x.shape[1:]), x.device).transpose(0, 1), t


def _by_time(values: Tensor, t: Tensor, all_times: Tensor) -> dict[str, Tensor]:
    """What values [m, b, N] contribute to the means in equal bins of the whole batch's times [m, B, N]."""

    def bins(times: Tensor) -> Tensor:
        return (times * _TIME_BINS).long().clamp_max(_TIME_BINS - 1).flatten()

    sums = torch.zeros(_TIME_BINS, dtype=torch.float32, device=t.device)
    sums.index_add_(0, bins(t), values.flatten().float())
    means = sums / torch.bincount(bins(all_times), minlength=_TIME_BINS).clamp_min(1)
    return {f"score_discrepancy_t{(number + 0.5) / _TIME_BINS:g}": mean for number, mean in enumerate(means)}


@contextlib.contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Within, the network's parameters take no gradient, whatever flows through it to its inputs."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
